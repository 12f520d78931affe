// Products by instructions that add pairs of products, or by what the compiler makes of loops. See gemm.hpp.

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int TOGETHER = 1;     // groups that one product computes
constexpr int MOST_TOKENS = 4;  // whose products and totals fit the registers

// One group of outputs times TOKENS tokens: few enough that all products stay in registers.
template <Kind KIND, int TOKENS>
static __attribute__((noinline)) void product(const BlockWeight& weight, int group, const Activations& x, int token,
                                              f8 (&result)[TOGETHER][TOKENS]) {
  using Form = Blocks<KIND>;
  constexpr bool LOWS = KIND == Kind::INT4;
  const int blocks = weight.inputs / BLOCK;
  const std::int64_t first = static_cast<std::int64_t>(group) * blocks;
  const std::uint8_t* values = static_cast<const std::uint8_t*>(weight.values) + first * Form::BYTES;
  const std::uint16_t* scales = weight.scales + first * GROUP;
  const std::uint16_t* lows = LOWS ? weight.lows + first * GROUP : nullptr;
  const auto* activation =
      static_cast<const typename Form::Activation*>(x.values) + static_cast<std::int64_t>(token) * weight.inputs;
  const float* activation_scale = x.scales + static_cast<std::int64_t>(token) * blocks;
  const float* activation_sum = LOWS ? x.sums + static_cast<std::int64_t>(token) * blocks : nullptr;
  const std::int64_t stride = weight.inputs;
  f8 totals[TOKENS] = {};
  for (int block = 0; block < blocks; ++block) {
    typename Form::Products products[TOKENS] = {};
#pragma GCC unroll 2
    for (int quad = 0; quad < QUADS; quad += Form::STEP) {
      typename Form::Quad quads[Form::STEP];
      Form::load_quads(values + quad / Form::STEP * LANES * 4, quads);
      for (int at = 0; at < Form::STEP; ++at) {
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t)
          Form::add_products(products[t], quads[at], activation + t * stride + (quad + at) * 4);
      }
    }
    const f8 scale = load_fp16(scales);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      totals[t] += Form::collected(products[t]) * (scale * splat(activation_scale[t * blocks]));
    }
    if constexpr (LOWS) {
      const f8 low = load_fp16(lows);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) totals[t] += low * splat(activation_sum[t * blocks]);
      lows += GROUP;
      activation_sum += 1;
    }
    values += Form::BYTES;
    scales += GROUP;
    activation += BLOCK;
    activation_scale += 1;
  }
  for (int t = 0; t < TOKENS; ++t) result[0][t] = totals[t];
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
