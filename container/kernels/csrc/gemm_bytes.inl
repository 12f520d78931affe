// Products by the instruction that adds four products of bytes, one of them without a sign, in vectors of two groups.
// See gemm.hpp.
//
// Exact, since four products and a block's sum fit 32 bits. Weights of int8 are read as bytes without a sign, which
// makes a block's products too large by 128 times its sum of activations: they begin at the negative of that.

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int TOGETHER = 2;     // groups that one product computes
constexpr int MOST_TOKENS = 8;  // whose products and totals fit the registers
constexpr int ROWS_APART = 3;   // rows that one pointer reaches: itself, one and two strides on
// Masks of whole vectors: without a mask some compilers' headers read a value that nobody set, and warn of it.
constexpr __mmask8 EVERY = 0xff;
constexpr __mmask16 EVERY_FLOAT = 0xffff;

static inline __m512i load_bytes(const std::uint8_t* first, const std::uint8_t* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  return _mm512_maskz_inserti64x4(EVERY, _mm512_castsi256_si512(low), high, 1);
}

static inline __m512 load_fp16(const std::uint16_t* first, const std::uint16_t* second) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
  return _mm512_maskz_cvtph_ps(EVERY_FLOAT, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}

// Outputs as a quad of int8 holds them, from their own order and back: both exchange each group's middle pairs.
template <Kind KIND>
static inline __m512 reordered(__m512 outputs) {
  if constexpr (KIND == Kind::INT4) return outputs;
  return _mm512_castsi512_ps(_mm512_maskz_permutex_epi64(EVERY, _mm512_castps_si512(outputs), 0xd8));
}

// Calls use(quad, weights) for each quad of a block: four inputs of 16 outputs as bytes without a sign.
template <Kind KIND, class Use>
static inline __attribute__((always_inline)) void each_quad(const std::uint8_t* first, const std::uint8_t* second,
                                                            Use&& use) {
  constexpr int BYTES = LANES * 4;
#pragma GCC unroll 8
  for (int at = 0; at < Blocks<KIND>::BYTES / BYTES; ++at) {
    const __m512i line = load_bytes(first + at * BYTES, second + at * BYTES);
    if constexpr (KIND == Kind::INT4) {
      use(2 * at, _mm512_and_si512(line, _mm512_set1_epi8(15)));
      use(2 * at + 1, _mm512_and_si512(_mm512_srli_epi16(line, 4), _mm512_set1_epi8(15)));
    } else {
      use(at, _mm512_xor_si512(line, _mm512_set1_epi8(-128)));
    }
  }
}

// Two groups of outputs, from `group` on, times TOKENS tokens. An odd weight's last group is computed twice.
template <Kind KIND, int TOKENS>
static __attribute__((noinline)) void product(const BlockWeight& weight, int group, const Activations& x, int token,
                                              f8 (&result)[TOGETHER][TOKENS]) {
  constexpr int POINTERS = (TOKENS + ROWS_APART - 1) / ROWS_APART;
  const std::int64_t inputs = weight.inputs, blocks = inputs / BLOCK;
  const std::int64_t here = group * blocks, next = (group + 1) * GROUP < weight.outputs ? blocks : 0;
  const std::uint8_t* values = static_cast<const std::uint8_t*>(weight.values) + here * Blocks<KIND>::BYTES;
  const std::int64_t next_values = next * Blocks<KIND>::BYTES, next_scales = next * GROUP;
  const std::uint16_t* scales = weight.scales + here * GROUP;
  const std::uint16_t* lows = KIND == Kind::INT4 ? weight.lows + here * GROUP : nullptr;
  const std::int8_t* rows[POINTERS];
  const float* row_scales[POINTERS];
  const float* row_sums[POINTERS];
  for (int at = 0; at < POINTERS; ++at) {
    const std::int64_t row = token + at * ROWS_APART;
    rows[at] = static_cast<const std::int8_t*>(x.values) + row * inputs;
    row_scales[at] = x.scales + row * blocks;
    row_sums[at] = x.sums + row * blocks;
  }
  const auto of_token = [](const auto* const* pointers, int t, std::int64_t stride) {
    return pointers[t / ROWS_APART] + t % ROWS_APART * stride;
  };
  __m512 totals[TOKENS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) totals[t] = _mm512_setzero_ps();
  for (std::int64_t block = 0; block < blocks; ++block) {
    __m512i products[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      if constexpr (KIND == Kind::INT4) {
        products[t] = _mm512_setzero_si512();
      } else {
        std::int32_t excess;
        std::memcpy(&excess, of_token(row_sums, t, blocks), sizeof excess);
        products[t] = _mm512_set1_epi32(excess);
      }
    }
    each_quad<KIND>(values, values + next_values, [&](int quad, __m512i weights) {
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        std::int32_t four;
        std::memcpy(&four, of_token(rows, t, inputs) + quad * 4, sizeof four);
        products[t] = _mm512_dpbusd_epi32(products[t], weights, _mm512_set1_epi32(four));
      }
    });
    const __m512 scale = reordered<KIND>(load_fp16(scales, scales + next_scales));
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 factor = scale * _mm512_set1_ps(*of_token(row_scales, t, blocks));
      totals[t] = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(EVERY_FLOAT, products[t]), factor, totals[t]);
    }
    if constexpr (KIND == Kind::INT4) {
      const __m512 low = load_fp16(lows, lows + next_scales);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t)
        totals[t] = _mm512_fmadd_ps(low, _mm512_set1_ps(*of_token(row_sums, t, blocks)), totals[t]);
      lows += GROUP;
    }
    values += Blocks<KIND>::BYTES;
    scales += GROUP;
#pragma GCC unroll 3
    for (int at = 0; at < POINTERS; ++at) rows[at] += BLOCK, row_scales[at] += 1, row_sums[at] += 1;
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) {
    const __m512 ordered = reordered<KIND>(totals[t]);
    result[0][t] = reinterpret_cast<f8>(_mm512_maskz_extractf32x8_ps(EVERY, ordered, 0));
    result[1][t] = reinterpret_cast<f8>(_mm512_maskz_extractf32x8_ps(EVERY, ordered, 1));
  }
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
