// Products with integer blocks, for one instruction set: how they are cut and shared out. See gemm.hpp.
#if defined(STRONGROOM_BYTE_SUMS)
#include "gemm_bytes.inl"
#else
#include "gemm_pairs.inl"
#endif

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int CHUNKS_PER_THREAD = 8;  // of a weight's groups: balance against the cost of taking one
constexpr int TILE_BYTES = 1 << 18;   // of activations that all groups of a chunk read before the next are: half a cache

template <int VALUE>
struct Width {
  static constexpr int value = VALUE;
};

// Calls write(group, token, results) for every GROUPS groups and every token.
template <Kind KIND, int GROUPS, class Write>
static inline void multiply_kind(Member& member, const BlockWeight& weight, const Activations& x, int tokens,
                                 Write&& write) {
  constexpr int UNIT = GROUPS > TOGETHER ? GROUPS : TOGETHER;
  static_assert(UNIT % GROUPS == 0 && UNIT % TOGETHER == 0, "both are powers of two");
  const int groups = weight.outputs / GROUP;
  const int units = (groups + UNIT - 1) / UNIT;
  const int wanted = member.size() * CHUNKS_PER_THREAD;
  const int chunk = units > wanted ? (units + wanted - 1) / wanted : 1;
  const int fit = TILE_BYTES / static_cast<int>(sizeof(typename Blocks<KIND>::Activation)) / weight.inputs;
  const int tile = fit > MOST_TOKENS ? fit / MOST_TOKENS * MOST_TOKENS : MOST_TOKENS;
  member.share((units + chunk - 1) / chunk, [&](int part) {
    const int end = (part + 1) * chunk < units ? (part + 1) * chunk : units;
    for (int begin = 0; begin < tokens; begin += tile) {
      const int after = begin + tile < tokens ? begin + tile : tokens;
      for (int unit = part * chunk; unit < end; ++unit) {
        const int group = unit * UNIT;
        int token = begin;
        const auto some = [&](auto width) {
          constexpr int WIDTH = decltype(width)::value;
          f8 result[UNIT / TOGETHER][TOGETHER][WIDTH];
          for (int at = 0; at < UNIT / TOGETHER; ++at)
            product<KIND, WIDTH>(weight, group + at * TOGETHER, x, token, result[at]);
          for (int first = 0; first < UNIT && group + first < groups; first += GROUPS) {
            for (int t = 0; t < WIDTH; ++t) {
              f8 one[GROUPS];
              for (int g = 0; g < GROUPS; ++g) one[g] = result[(first + g) / TOGETHER][(first + g) % TOGETHER][t];
              write(group + first, token + t, one);
            }
          }
          token += WIDTH;
        };
        while (token + MOST_TOKENS <= after) some(Width<MOST_TOKENS>{});
        if (MOST_TOKENS > 4 && token + 4 <= after) some(Width<4>{});
        if (token + 2 <= after) some(Width<2>{});
        if (token < after) some(Width<1>{});
      }
    }
  });
}

template <int GROUPS, class Write>
static inline void multiply(Member& member, const BlockWeight& weight, const Activations& x, int tokens,
                            Write&& write) {
  with_kind(weight.kind, [&](auto fixed) {
    multiply_kind<decltype(fixed)::value, GROUPS>(member, weight, x, tokens, write);
  });
}

static inline f8 bias_of(const BlockWeight& weight, int group) {
  return weight.bias == nullptr ? f8{} : load(weight.bias + group * GROUP);
}

static void multiply_blocks(Member& member, const BlockWeight& weight, Activations x, int tokens, float* y,
                            std::int64_t stride) {
  multiply<1>(member, weight, x, tokens, [&](int group, int token, const f8 (&result)[1]) {
    store(y + token * stride + group * GROUP, result[0] + bias_of(weight, group));
  });
  member.barrier();
}

// One group times one token whose activations were not quantized.
static inline f8 plain_int8(const BlockWeight& weight, int group, const float* x) {
  const int blocks = weight.inputs / BLOCK;
  const auto* values = static_cast<const std::uint8_t*>(weight.values);
  f8 result = {};
  for (int block = 0; block < blocks; ++block) {
    const std::int64_t at = static_cast<std::int64_t>(group) * blocks + block;
    f8 sums = {};
    for (int quad = 0; quad < QUADS; ++quad) {
      i8 four;
      std::memcpy(&four, values + at * Blocks<Kind::INT8>::BYTES + quad * LANES * 4, sizeof four);
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

// With each weight rounded once, as unpacking does: scale * value + low on its own loses less than the two sums.
static inline f8 plain_int4(const BlockWeight& weight, int group, const float* x) {
  const int blocks = weight.inputs / BLOCK;
  const auto* values = static_cast<const std::uint8_t*>(weight.values);
  f8 result = {};
  for (int block = 0; block < blocks; ++block) {
    const std::int64_t at = static_cast<std::int64_t>(group) * blocks + block;
    const f8 scale = load_fp16(weight.scales + at * GROUP), low = load_fp16(weight.lows + at * GROUP);
    for (int quad = 0; quad < QUADS; ++quad) {
      i8 four;
      std::memcpy(&four, values + at * Blocks<Kind::INT4>::BYTES + quad / 2 * LANES * 4, sizeof four);
      four >>= quad % 2 * 4;
      const float* inputs = x + block * BLOCK + quad * 4;
      for (int input = 0; input < 4; ++input) {
        const f8 one = to_float((four >> (8 * input)) & 15) * scale + low;
        result += one * splat(inputs[input]);
      }
    }
  }
  return result;
}

static inline f8 plain_product(const BlockWeight& weight, int group, const float* x) {
  return weight.kind == Kind::INT4 ? plain_int4(weight, group, x) : plain_int8(weight, group, x);
}

static void multiply_plain(Member& member, const BlockWeight& weight, const float* x, int tokens, float* y,
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
