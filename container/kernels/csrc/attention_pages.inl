// How one kv head's keys and values lie in a page, for one instruction set. See attention.hpp.

namespace strongroom {
namespace STRONGROOM_ISA {

inline f8 load8(const float* from) { return load(from); }

inline f8 load8(const std::uint16_t* from) {
#if defined(__AVX2__)  // the compiler widens the generic form in two halves
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<f8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
  return load_bf16(from);
#endif
}

inline f8 load8(const std::int8_t* from) {
#if defined(__AVX2__)
  return reinterpret_cast<f8>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(
      reinterpret_cast<const __m128i*>(from)))));
#else
  typedef std::int8_t b8 __attribute__((vector_size(8)));
  b8 bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return to_float(__builtin_convertvector(bytes, i8));
#endif
}

// One kv head in one page.
template <class T>
struct Part {
  T* keys;              // (dim, lanes)
  T* values;            // (page_tokens, dim)
  float* key_scales;    // (lanes), int8 only
  float* value_scales;
};

// One kv head of one sequence, page by page.
template <class T>
struct Keep {
  const AttentionLayer& layer;
  const Row& row;
  int head;
  int page_tokens;
  int lanes;

  Keep(const AttentionLayer& its_layer, const Paging& paging, const Row& its_row, int its_head)
      : layer(its_layer),
        row(its_row),
        head(its_head),
        page_tokens(paging.page_tokens),
        lanes((paging.page_tokens + LANES - 1) / LANES * LANES) {}

  Part<T> part(int page) const {
    const std::int64_t key_run = std::int64_t{lanes} * layer.dim;
    const std::int64_t value_run = std::int64_t{page_tokens} * layer.dim;
    std::uint8_t* base = row.pages[page];
    T* keys = reinterpret_cast<T*>(base + layer.key_offset);
    T* values = reinterpret_cast<T*>(base + layer.value_offset);
    return {keys + head * key_run, values + head * value_run,
            reinterpret_cast<float*>(keys + layer.kv_heads * key_run) + head * lanes,
            reinterpret_cast<float*>(values + layer.kv_heads * value_run) + head * lanes};
  }
};

inline void encode8(const float* from, float* to, float) { store(to, load(from)); }

inline void encode8(const float* from, std::uint16_t* to, float) { store_bf16(to, load(from)); }

// Rounds to nearest, ties to even, by adding 1.5 * 2^23: what is added lies within +-127.
inline void encode8(const float* from, std::int8_t* to, float inverse) {
  const f8 magic = splat(12582912.0f);
  const f8 rounded = (load(from) * splat(inverse) + magic) - magic;
  const i8 whole = __builtin_convertvector(rounded, i8);
  for (int lane = 0; lane < LANES; ++lane) to[lane] = static_cast<std::int8_t>(whole[lane]);
}

template <class T>
inline float scale_of(const float*, int, float*) {
  return 1.0f;
}

// The largest magnitude becomes 127. A NaN or an infinity anywhere makes the scale NaN: it must not turn into a number.
template <>
inline float scale_of<std::int8_t>(const float* from, int dim, float* scale) {
  f8 biggest = {};
  f8 poison = {};
  for (int d = 0; d < dim; d += LANES) {
    biggest = max(magnitude(load(from + d)), biggest);
    poison += load(from + d) * splat(0.0f);
  }
  const float most = largest(biggest);
  *scale = most / 127.0f + sum(poison);
  return most > 0.0f ? 127.0f / most : 0.0f;
}

// Stores the row's positions [first, last) that lie in its own tokens; `qkv` as attention takes it.
template <class T>
void write_positions(const Keep<T>& keep, const float* qkv, int first, int last) {
  const AttentionLayer& layer = keep.layer;
  const int dim = layer.dim;
  const std::int64_t width = std::int64_t{layer.heads + 2 * layer.kv_heads} * dim;
  for (int position = first; position < last; ++position) {
    const Part<T> part = keep.part(position / keep.page_tokens);
    const int at = position % keep.page_tokens;
    const float* key = qkv + (keep.row.first + position - keep.row.start) * width +
                       std::int64_t{layer.heads + keep.head} * dim;
    const float* value = key + std::int64_t{layer.kv_heads} * dim;
    const float key_inverse = scale_of<T>(key, dim, part.key_scales + at);
    const float value_inverse = scale_of<T>(value, dim, part.value_scales + at);
    for (int d = 0; d < dim; d += LANES) {
      T across[LANES];
      encode8(key + d, across, key_inverse);
      for (int lane = 0; lane < LANES; ++lane) part.keys[(d + lane) * keep.lanes + at] = across[lane];
      encode8(value + d, part.values + at * dim + d, value_inverse);
    }
  }
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
