// Products with integer blocks, for one instruction set. See gemm.hpp.

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int QUADS = BLOCK / 4;          // vectors per block of one group
constexpr int BLOCK_VALUES = BLOCK * GROUP;
constexpr float SMALLEST_BLOCK = 7.888609052210118e-31f;  // 2^-100; below it a block counts as zeros
constexpr float INT8_LIMIT = 127.0f;
[[maybe_unused]] constexpr int ORDER[GROUP] = {0, 1, 4, 5, 2, 3, 6, 7};  // in which a quad holds its outputs
constexpr int CHUNKS_PER_THREAD = 8;      // of a weight's groups: balance against the cost of taking one

template <int VALUE>
struct Width {
  static constexpr int value = VALUE;
};

// Four inputs of 8 outputs as 16-bit numbers: `low` the outputs 0, 1, 4, 5, `high` the outputs 2, 3, 6, 7.
struct Quad {
#if defined(__AVX2__)
  __m256i low, high;
#else
  std::int8_t value[LANES * 4];
#endif
};

// Running sums of products, two of each output's in neighbouring lanes.
struct Products {
  i8 low, high;
};

static inline Quad load_quad(const std::int8_t* from) {
  Quad quad;
#if defined(__AVX2__)
  // Widening once for all tokens costs less than the signs that products of 8 bits need for each.
  quad.low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  quad.high = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)));
#else
  std::memcpy(quad.value, from, sizeof quad.value);
#endif
  return quad;
}

// Adds the products of four inputs to the sums, exactly.
static inline void add_products(Products& products, const Quad& weight, const std::int16_t* activation) {
#if defined(__AVX2__)
  long long four;
  std::memcpy(&four, activation, sizeof four);
  const __m256i inputs = _mm256_set1_epi64x(four);
  products.low += reinterpret_cast<i8>(_mm256_madd_epi16(weight.low, inputs));
  products.high += reinterpret_cast<i8>(_mm256_madd_epi16(weight.high, inputs));
#else
  for (int lane = 0; lane < LANES; ++lane) {  // of the weights as they lie
    i8& half = lane < 4 ? products.low : products.high;
    for (int at = 0; at < 4; ++at) half[lane % 4 * 2 + at / 2] += weight.value[lane * 4 + at] * activation[at];
  }
#endif
}

// Returns one sum per output.
static inline f8 collected(const Products& products) {
#if defined(__AVX2__)
  const __m256i pairs = _mm256_hadd_epi32(reinterpret_cast<__m256i>(products.low), reinterpret_cast<__m256i>(products.high));
  return to_float(reinterpret_cast<i8>(pairs));  // lies in order because the weights do not
#else
  f8 result;
  for (int lane = 0; lane < LANES; ++lane) {
    const i8& half = lane < 4 ? products.low : products.high;
    result[ORDER[lane]] = static_cast<float>(half[lane % 4 * 2] + half[lane % 4 * 2 + 1]);
  }
  return result;
#endif
}

static inline f8 load_fp16(const std::uint16_t* from) {
#if defined(__F16C__)
  return reinterpret_cast<f8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  f8 result;
  for (int lane = 0; lane < LANES; ++lane) {
    const std::uint32_t half = from[lane], sign = (half & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    float value;
    if (exponent == 0) {
      value = static_cast<float>(fraction) * 5.9604644775390625e-08f;  // 2^-24
    } else {
      const std::uint32_t bits = ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
      std::memcpy(&value, &bits, sizeof value);
    }
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    result[lane] = value;
  }
  return result;
#endif
}

// One block of 32 values: largest magnitude, then round to nearest, ties to even.
static inline void quantize_block(const float* x, std::int16_t* values, float* scale) {
  f8 part[BLOCK / LANES];
  f8 most = {};
  bool finite = true;
  for (int at = 0; at < BLOCK / LANES; ++at) {
    part[at] = load(x + at * LANES);
    most = max(magnitude(part[at]), most);  // a NaN on the left of > is dropped: looked for below
  }
  float limit = largest(most);
  for (int at = 0; at < BLOCK / LANES; ++at) {
    const i8 unordered = part[at] != part[at];
    for (int lane = 0; lane < LANES; ++lane) finite = finite && unordered[lane] == 0;
  }
  if (!finite) limit = __builtin_nanf("");
  if (limit < SMALLEST_BLOCK) limit = 0.0f;
  // Where a value is not finite the scale carries that to the result: 0 * 127 would hide it.
  const f8 inverse = splat(limit > 0.0f && limit <= 3.402823466e38f ? INT8_LIMIT / limit : 0.0f);
  *scale = limit / INT8_LIMIT;
#if defined(__AVX2__)
  for (int at = 0; at < BLOCK / LANES; at += 2) {
    const __m256i first = _mm256_cvtps_epi32(reinterpret_cast<__m256>(part[at] * inverse));
    const __m256i second = _mm256_cvtps_epi32(reinterpret_cast<__m256>(part[at + 1] * inverse));
    // Saturates: what is not finite converts to the least integer.
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + at * LANES), both);
  }
#else
  for (int at = 0; at < BLOCK; ++at) {
    const float scaled = part[at / LANES][at % LANES] * inverse[0];
    values[at] = finite && scaled == scaled ? static_cast<std::int16_t>(__builtin_rintf(scaled)) : std::int16_t{1};
  }
#endif
}

static inline void quantize_row(const float* x, int inputs, std::int16_t* values, float* scales) {
  for (int at = 0; at < inputs; at += BLOCK) quantize_block(x + at, values + at, scales + at / BLOCK);
}

static void quantize(Member& member, const float* x, int tokens, int inputs, Activations to) {
  member.share(tokens, [&](int token) {
    const std::int64_t at = static_cast<std::int64_t>(token) * inputs;
    quantize_row(x + at, inputs, to.values + at, to.scales + at / BLOCK);
  });
}

// One group of outputs times TOKENS tokens: few enough that all products stay in registers.
template <int TOKENS>
static __attribute__((noinline)) void product(const Int8Weight& weight, int group, const Activations& x, int token,
                                              f8* result) {
  const int blocks = weight.inputs / BLOCK;
  const std::int64_t first = static_cast<std::int64_t>(group) * blocks;
  const std::int8_t* values = weight.values + first * BLOCK_VALUES;
  const std::uint16_t* scales = weight.scales + first * GROUP;
  const std::int16_t* activation = x.values + static_cast<std::int64_t>(token) * weight.inputs;
  const float* activation_scale = x.scales + static_cast<std::int64_t>(token) * blocks;
  const std::int64_t stride = weight.inputs;
  f8 totals[TOKENS] = {};
  for (int block = 0; block < blocks; ++block) {
    Products products[TOKENS] = {};
#pragma GCC unroll 2
    for (int quad = 0; quad < QUADS; ++quad) {
      const Quad four = load_quad(values + quad * LANES * 4);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t)
        add_products(products[t], four, activation + t * stride + quad * 4);
    }
    const f8 scale = load_fp16(scales);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
      totals[t] += collected(products[t]) * (scale * splat(activation_scale[t * blocks]));
    values += BLOCK_VALUES;
    scales += GROUP;
    activation += BLOCK;
    activation_scale += 1;
  }
  for (int t = 0; t < TOKENS; ++t) result[t] = totals[t];
}

// Calls write(group, token, results) for every GROUPS groups and every token.
template <int GROUPS, class Write>
static inline void multiply(Member& member, const Int8Weight& weight, const Activations& x, int tokens,
                            Write&& write) {
  const int units = weight.outputs / GROUP / GROUPS;
  const int wanted = member.size() * CHUNKS_PER_THREAD;
  const int chunk = units > wanted ? (units + wanted - 1) / wanted : 1;
  member.share((units + chunk - 1) / chunk, [&](int part) {
    const int end = (part + 1) * chunk < units ? (part + 1) * chunk : units;
    for (int unit = part * chunk; unit < end; ++unit) {
      const int group = unit * GROUPS;
      int token = 0;
      const auto some = [&](auto width) {
        constexpr int WIDTH = decltype(width)::value;
        f8 result[GROUPS][WIDTH];
        for (int g = 0; g < GROUPS; ++g) product<WIDTH>(weight, group + g, x, token, result[g]);
        for (int t = 0; t < WIDTH; ++t) {
          f8 one[GROUPS];
          for (int g = 0; g < GROUPS; ++g) one[g] = result[g][t];
          write(group, token + t, one);
        }
        token += WIDTH;
      };
      while (token + 4 <= tokens) some(Width<4>{});
      if (token + 2 <= tokens) some(Width<2>{});
      if (token < tokens) some(Width<1>{});
    }
  });
}

static inline f8 bias_of(const Int8Weight& weight, int group) {
  return weight.bias == nullptr ? f8{} : load(weight.bias + group * GROUP);
}

static void multiply_int8(Member& member, const Int8Weight& weight, Activations x, int tokens, float* y,
                          std::int64_t stride) {
  multiply<1>(member, weight, x, tokens, [&](int group, int token, const f8 (&result)[1]) {
    store(y + token * stride + group * GROUP, result[0] + bias_of(weight, group));
  });
  member.barrier();
}

// One group times one token whose activations were not quantized.
static inline f8 plain_product(const Int8Weight& weight, int group, const float* x) {
  const int blocks = weight.inputs / BLOCK;
  f8 result = {};
  for (int block = 0; block < blocks; ++block) {
    const std::int64_t at = static_cast<std::int64_t>(group) * blocks + block;
    f8 sums = {};
    for (int quad = 0; quad < QUADS; ++quad) {
      i8 four;
      std::memcpy(&four, weight.values + at * BLOCK_VALUES + quad * LANES * 4, sizeof four);
      const float* inputs = x + block * BLOCK + quad * 4;
      sums += to_float((four << 24) >> 24) * splat(inputs[0]);
      sums += to_float((four << 16) >> 24) * splat(inputs[1]);
      sums += to_float((four << 8) >> 24) * splat(inputs[2]);
      sums += to_float(four >> 24) * splat(inputs[3]);
    }
    f8 ordered;
    for (int lane = 0; lane < LANES; ++lane) ordered[ORDER[lane]] = sums[lane];
    result += ordered * load_fp16(weight.scales + at * GROUP);
  }
  return result;
}

static void multiply_plain(Member& member, const Int8Weight& weight, const float* x, int tokens, float* y,
                           std::int64_t stride) {
  member.share(weight.outputs / GROUP, [&](int group) {
    for (int token = 0; token < tokens; ++token) {
      const f8 result = plain_product(weight, group, x + static_cast<std::int64_t>(token) * weight.inputs);
      store(y + token * stride + group * GROUP, result + bias_of(weight, group));
    }
  });
  member.barrier();
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
