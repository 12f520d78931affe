// Integer blocks for one instruction set: how their quads are read and multiplied, activations quantized.
// See gemm.hpp.

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int QUADS = BLOCK / 4;          // vectors per block of one group
constexpr float SMALLEST_BLOCK = 7.888609052210118e-31f;  // 2^-100; below it a block counts as zeros
constexpr float INT8_LIMIT = 127.0f;
[[maybe_unused]] constexpr std::int32_t BYTE_SHIFT = 128;  // what makes a weight of int8 a byte without a sign
#if defined(__AVX512VNNI__)
#define STRONGROOM_BYTE_SUMS 1            // one instruction adds four products of bytes, one of them without a sign
#endif
[[maybe_unused]] constexpr int ORDER[GROUP] = {0, 1, 4, 5, 2, 3, 6, 7};  // in which a quad holds its outputs

template <Kind KIND>
struct Fixed {
  static constexpr Kind value = KIND;
};

// Quads and sums of products of one kind of blocks. The weight's halves, where it is wide, are the outputs
// 0, 1, 4, 5 and 2, 3, 6, 7.
template <Kind KIND>
struct Blocks;

#if defined(STRONGROOM_BYTE_SUMS)
template <>
struct Blocks<Kind::INT8> {
  using Activation = std::int8_t;
  static constexpr int BYTES = BLOCK * GROUP;
  static constexpr int STEP = 1;
  static constexpr bool SHIFTED = true;  // products are too large by 128 times the sum of activations
};
#else
template <>
struct Blocks<Kind::INT8> {
  static constexpr bool SHIFTED = false;
  using Activation = std::int16_t;
  static constexpr int BYTES = BLOCK * GROUP;  // of one group's block
  static constexpr int STEP = 1;               // quads loaded at once

  // Four inputs of 8 outputs as 16-bit numbers.
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

  static inline void load_quads(const std::uint8_t* from, Quad (&quads)[STEP]) {
#if defined(__AVX2__)
    // Widening once for all tokens costs less than the signs that products of 8 bits need for each.
    quads[0].low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    quads[0].high = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)));
#else
    std::memcpy(quads[0].value, from, sizeof quads[0].value);
#endif
  }

  // Adds the products of four inputs to the sums, exactly.
  static inline void add_products(Products& products, const Quad& weight, const Activation* activation) {
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
    const __m256i pairs =
        _mm256_hadd_epi32(reinterpret_cast<__m256i>(products.low), reinterpret_cast<__m256i>(products.high));
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
};
#endif

template <>
struct Blocks<Kind::INT4> {
  using Activation = std::int8_t;
  static constexpr int BYTES = BLOCK * GROUP / 2;
  static constexpr int STEP = 2;
  static constexpr bool SHIFTED = false;

#if !defined(STRONGROOM_BYTE_SUMS)
  // Four inputs of 8 outputs as bytes without a sign.
  struct Quad {
#if defined(__AVX2__)
    __m256i value;
#else
    std::uint8_t value[LANES * 4];
#endif
  };

  // Two sums per output in 16 bits: a block has 16 products for each, of which none exceeds 15 * 128.
  struct Products {
#if defined(__AVX2__)
    __m256i pairs;
#else
    i8 sums;
#endif
  };
  static_assert(BLOCK / 2 * 15 * 128 < 32768, "the sums of a block fit 16 bits");

  static inline void load_quads(const std::uint8_t* from, Quad (&quads)[STEP]) {
#if defined(__AVX2__)
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i low = _mm256_set1_epi8(15);
    quads[0].value = _mm256_and_si256(both, low);
    quads[1].value = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#else
    for (int at = 0; at < LANES * 4; ++at) {
      quads[0].value[at] = from[at] & 15;
      quads[1].value[at] = from[at] >> 4;
    }
#endif
  }

  static inline void add_products(Products& products, const Quad& weight, const Activation* activation) {
#if defined(__AVX2__)
    std::int32_t four;
    std::memcpy(&four, activation, sizeof four);
    products.pairs = _mm256_add_epi16(products.pairs, _mm256_maddubs_epi16(weight.value, _mm256_set1_epi32(four)));
#else
    for (int lane = 0; lane < LANES; ++lane)
      for (int at = 0; at < 4; ++at) products.sums[lane] += weight.value[lane * 4 + at] * activation[at];
#endif
  }

  static inline f8 collected(const Products& products) {
#if defined(__AVX2__)
    return to_float(reinterpret_cast<i8>(_mm256_madd_epi16(products.pairs, _mm256_set1_epi16(1))));
#else
    return to_float(products.sums);
#endif
  }
#endif
};

// Calls work(which) with the kind as a constant.
template <class Work>
static inline void with_kind(Kind kind, Work&& work) {
  if (kind == Kind::INT4) {
    work(Fixed<Kind::INT4>{});
  } else {
    work(Fixed<Kind::INT8>{});
  }
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

#if !defined(__AVX2__)
static inline float rounded(float scaled) { return scaled == scaled ? __builtin_rintf(scaled) : 1.0f; }
#endif

// Rounds a block times `inverse` to nearest, ties to even. What is not finite becomes some number: its scale is not.
[[maybe_unused]] static inline void round_block(const f8 (&part)[BLOCK / LANES], f8 inverse, std::int16_t* values) {
#if defined(__AVX2__)
  for (int at = 0; at < BLOCK / LANES; at += 2) {
    const __m256i first = _mm256_cvtps_epi32(reinterpret_cast<__m256>(part[at] * inverse));
    const __m256i second = _mm256_cvtps_epi32(reinterpret_cast<__m256>(part[at + 1] * inverse));
    // Saturates: what is not finite converts to the least integer.
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + at * LANES), both);
  }
#else
  for (int at = 0; at < BLOCK; ++at)
    values[at] = static_cast<std::int16_t>(rounded(part[at / LANES][at % LANES] * inverse[0]));
#endif
}

// The same in 8 bits; returns the sum of the values.
static inline int round_block(const f8 (&part)[BLOCK / LANES], f8 inverse, std::int8_t* values) {
#if defined(__AVX2__)
  __m256i whole[BLOCK / LANES];
  for (int at = 0; at < BLOCK / LANES; ++at)
    whole[at] = _mm256_cvtps_epi32(reinterpret_cast<__m256>(part[at] * inverse));
  const __m256i first = _mm256_packs_epi32(whole[0], whole[1]), second = _mm256_packs_epi32(whole[2], whole[3]);
  const __m256i bytes = _mm256_packs_epi16(first, second);
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), ordered);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  const i8 sums = reinterpret_cast<i8>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
#else
  int sum = 0;
  for (int at = 0; at < BLOCK; ++at) {
    values[at] = static_cast<std::int8_t>(rounded(part[at / LANES][at % LANES] * inverse[0]));
    sum += values[at];
  }
  return sum;
#endif
}

// One block of 32 values: largest magnitude, then round.
template <Kind KIND>
static inline void quantize_block(const float* x, typename Blocks<KIND>::Activation* values, float* scale,
                                  [[maybe_unused]] float* sum) {
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
  if constexpr (KIND == Kind::INT4) {
    *sum = *scale * static_cast<float>(round_block(part, inverse, values));
  } else if constexpr (Blocks<KIND>::SHIFTED) {
    const std::int32_t excess = -BYTE_SHIFT * round_block(part, inverse, values);
    std::memcpy(sum, &excess, sizeof excess);
  } else {
    round_block(part, inverse, values);
  }
}

// Activations from place `at` on, a multiple of a block.
static inline Activations from(const Activations& x, Kind kind, std::int64_t at) {
  std::int64_t bytes = 0;
  with_kind(kind, [&](auto fixed) { bytes = sizeof(typename Blocks<decltype(fixed)::value>::Activation); });
  return {static_cast<std::uint8_t*>(x.values) + at * bytes, x.scales + at / BLOCK, x.sums + at / BLOCK};
}

static inline void quantize_row(Kind kind, const float* x, int inputs, const Activations& to) {
  with_kind(kind, [&](auto fixed) {
    constexpr Kind KIND = decltype(fixed)::value;
    auto* values = static_cast<typename Blocks<KIND>::Activation*>(to.values);
    for (int at = 0; at < inputs; at += BLOCK)
      quantize_block<KIND>(x + at, values + at, to.scales + at / BLOCK, to.sums + at / BLOCK);
  });
}

static void quantize(Member& member, Kind kind, const float* x, int tokens, int inputs, Activations to) {
  member.share(tokens, [&](int token) {
    const std::int64_t at = static_cast<std::int64_t>(token) * inputs;
    quantize_row(kind, x + at, inputs, from(to, kind, at));
  });
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
