// Queries of one sequence against its bfloat16 pages, where the machine multiplies pairs of bfloat16 and adds them in
// float. See attention.hpp.
//
// As in attention_tile.inl, keys come in chunks at fixed positions. A chunk is laid out for the products first, its
// positions side by side whatever a page holds: a pair of keys' elements, or of positions' values, fills 32 bits, and
// one vector has 16 of them. Queries and weights are rounded to bfloat16; sums, maxima and weights' sums stay float.

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int PAIR = 2;
constexpr int WIDE = 16;  // lanes of a vector
constexpr int CHUNK_VECTORS = CHUNK_LANES / WIDE;
constexpr int PAIRS_ROWS = 6;  // x 4 vectors: 24 sums, 4 operands of 32 registers; factors come from memory

using Pair = std::uint32_t;

struct PairedChunk {
  alignas(64) Pair keys[ATTENTION_MAX_DIM / PAIR * CHUNK_LANES];    // (dim / 2, CHUNK_LANES)
  alignas(64) Pair values[CHUNK_LANES / PAIR * ATTENTION_MAX_DIM];  // (CHUNK_LANES / 2, wide dim)
  int first;  // position of the first key
  int count;  // positions up to the last that anybody in the tile sees
};

struct PairedTile {
  alignas(64) Pair queries[TILE_ROWS * ATTENTION_MAX_DIM / PAIR];  // (rows, dim / 2)
  const int* positions;
  int rows;
};

inline int wide(int dim) { return (dim + WIDE - 1) / WIDE * WIDE; }

constexpr __mmask16 ALL = 0xffff;  // masked forms only: GCC 12 takes the others' unused operand for uninitialized

inline __mmask16 lanes_below(int count) {
  return count >= WIDE ? ALL : static_cast<__mmask16>((1u << larger(count, 0)) - 1);
}

inline __m512i paired(__m256i low, __m256i high) {
  const __m512i upper = _mm512_maskz_slli_epi32(ALL, _mm512_maskz_cvtepu16_epi32(ALL, high), 16);
  return _mm512_or_si512(_mm512_maskz_cvtepu16_epi32(ALL, low), upper);
}

inline void store_pairs(Pair* to, __m512 value) {
  const auto halves = _mm512_cvtneps_pbh(value);
  std::memcpy(to, &halves, sizeof halves);
}

// Copies one page's keys to lanes [lane, lane + lanes); what lies behind its last position is overwritten later.
inline void pair_keys(const std::uint16_t* keys, int dim, int lanes, Pair* to) {
  for (int d = 0; d < dim; d += PAIR) {
    const std::uint16_t* from = keys + d * lanes;
    int lane = 0;
    for (; lane + WIDE <= lanes; lane += WIDE) {
      const __m512i pairs = paired(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + lane)),
                                   _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + lanes + lane)));
      _mm512_storeu_si512(to + d / PAIR * CHUNK_LANES + lane, pairs);
    }
    if (lane < lanes) {  // eight are left
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lane));
      const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + lanes + lane));
      const __m512i pairs = paired(_mm256_zextsi128_si256(low), _mm256_zextsi128_si256(high));
      _mm512_mask_storeu_epi32(to + d / PAIR * CHUNK_LANES + lane, lanes_below(lanes - lane), pairs);
    }
  }
}

// Interleaves the values of two neighbouring positions.
inline void pair_values(const std::uint16_t* low, const std::uint16_t* high, int dim, Pair* to) {
  for (int d = 0; d < dim; d += WIDE) {
    const __mmask16 mask = lanes_below(dim - d);
    _mm512_store_si512(to + d, paired(_mm256_maskz_loadu_epi16(mask, low + d),
                                      _mm256_maskz_loadu_epi16(mask, high + d)));
  }
}

// Lays out the chunk that begins with page `first_page`. Nobody sees positions outside of [first, last): their keys
// become anything and their values zero, whatever a page holds there.
inline void lay_out(const Keep<std::uint16_t>& keep, int first_page, int first, int last, PairedChunk& chunk) {
  static constexpr std::uint16_t ZERO[ATTENTION_MAX_DIM] = {};
  const int dim = keep.layer.dim;
  chunk.first = first_page * keep.page_tokens;
  chunk.count = smaller(last - chunk.first, chunk_pages(keep.lanes) * keep.page_tokens);
  const std::uint16_t* rows[CHUNK_LANES + ATTENTION_MAX_PAGE_TOKENS];
  for (int at = 0; at < chunk.count; at += keep.page_tokens) {
    const Part<std::uint16_t> part = keep.part(first_page + at / keep.page_tokens);
    if (chunk.first + at + keep.page_tokens > first) pair_keys(part.keys, dim, keep.lanes, chunk.keys + at);
    for (int token = 0; token < keep.page_tokens; ++token) {
      const int position = chunk.first + at + token;
      rows[at + token] = position >= first && position < last ? part.values + token * dim : ZERO;
    }
  }
  for (int at = 0; at < chunk.count; at += PAIR) {
    const std::uint16_t* next = at + 1 < chunk.count ? rows[at + 1] : ZERO;
    pair_values(rows[at], next, dim, chunk.values + at / PAIR * wide(dim));
  }
}

// Adds the products of R factors and V vectors, pair by pair.
template <int R, int V>
inline __attribute__((always_inline)) void add_pairs(__m512 (&sums)[R][V], const Pair* factors, int stride,
                                                     const Pair* vectors) {
  __m512bh values[V];
  for (int v = 0; v < V; ++v) values[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(vectors + v * WIDE));
  for (int r = 0; r < R; ++r) {
    const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(factors[r * stride])));
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], factor, values[v]);
  }
}

// Products of R queries with the chunk's first V * 16 keys.
template <int R, int V>
inline void score_pairs(const Pair* keys, int pairs, const Pair* queries, float* scores) {
  __m512 sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int d = 0; d < pairs; ++d) add_pairs<R, V>(sums, queries + d, pairs, keys + d * CHUNK_LANES);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) _mm512_store_ps(scores + r * CHUNK_LANES + v * WIDE, sums[r][v]);
  }
}

// Adds V * 16 elements of the chunk's values, weighted, to R rows.
template <int R, int V>
inline void weigh_pairs(const Pair* values, int pairs, int dim, int d, const Pair* weights, const float* shrink,
                        float* to) {
  __m512 sums[R][V];
  for (int r = 0; r < R; ++r) {
    const __m512 worth = _mm512_set1_ps(shrink[r]);
    for (int v = 0; v < V; ++v) {
      const __mmask16 mask = lanes_below(dim - d - v * WIDE);
      sums[r][v] = _mm512_maskz_loadu_ps(mask, to + r * dim + d + v * WIDE) * worth;
    }
  }
  for (int at = 0; at < pairs; ++at) add_pairs<R, V>(sums, weights + at, CHUNK_LANES / PAIR, values + at * wide(dim) + d);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      const __mmask16 mask = lanes_below(dim - d - v * WIDE);
      _mm512_mask_storeu_ps(to + r * dim + d + v * WIDE, mask, sums[r][v]);
    }
  }
}

// exp(x) for x <= 0, relative error below 1e-6 beside that of x * log2(e): 2^n times a polynomial on [-1/2, 1/2],
// fitted for the least relative error. Below -87 the result is 0; NaN stays NaN.
inline __m512 exp_wide(__m512 x) {
  const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
  const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_maskz_roundscale_ps(ALL, x * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmsub_ps(x, log2e, n);
  __m512 p = _mm512_set1_ps(1.326472614891827e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.671512991189957e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550733581185341e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022242426872253e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931470036506653e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(seen, p, n);
}

// Folds a vector's lanes into one, halves first: `both` combines two vectors of four.
template <class Both>
inline float folded(__m512 value, Both&& both) {
  const __m256 low = _mm512_maskz_extractf32x8_ps(0xff, value, 0), high = _mm512_maskz_extractf32x8_ps(0xff, value, 1);
  const __m128 halves = both(both(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1)),
                             both(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1)));
  const __m128 two = both(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(both(two, _mm_movehdup_ps(two)));
}

// The lanes that a query at `position` sees of a chunk whose first `count` lanes hold positions from `first` on.
inline std::uint64_t lanes_seen(int position, int window, int first, int count) {
  const int end = clamp(position + 1 - first, 0, count);
  const int begin = window > 0 ? clamp(position + 1 - window - first, 0, CHUNK_LANES) : 0;
  const auto below = [](int count) { return count == CHUNK_LANES ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1; };
  return below(end) & ~below(begin);
}

// Turns R rows of V vectors of products into weights and takes them into the rows' sums; `shrink` is what older sums
// are worth.
template <int R, int V>
inline void soften_pairs(const AttentionLayer& layer, int first, int count, const int* positions, const float* scores,
                         const Sums& sums, Pair* weights, float* shrink) {
  f8 fall = {};
  const __m512 scale = _mm512_set1_ps(layer.scale);
  const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
  float totals[R];
  for (int r = 0; r < R; ++r) {
    const std::uint64_t seen = lanes_seen(positions[r], layer.window, first, count);
    __m512 row[V];
    __m512 biggest = _mm512_set1_ps(sums.most[r]);
    for (int v = 0; v < V; ++v) {
      const auto mask = static_cast<__mmask16>(seen >> (v * WIDE));
      row[v] = _mm512_mask_mul_ps(nothing, mask, _mm512_load_ps(scores + r * CHUNK_LANES + v * WIDE), scale);
      biggest = _mm512_maskz_max_ps(ALL, row[v], biggest);  // a NaN is not taken
    }
    const float most = folded(biggest, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
    fall[r] = sums.most[r] - most;
    sums.most[r] = most;
    __m512 total = _mm512_setzero_ps();
    for (int v = 0; v < V; ++v) {
      const __m512 weight = exp_wide(row[v] - _mm512_set1_ps(most));
      total += weight;
      store_pairs(weights + r * CHUNK_LANES / PAIR + v * WIDE / PAIR, weight);
    }
    totals[r] = folded(total, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
  }
  const f8 worth = exp(fall);
  for (int r = 0; r < R; ++r) {
    shrink[r] = worth[r];
    sums.weight[r] = sums.weight[r] * worth[r] + totals[r];
  }
}

// R rows, from row `begin` of the tile, against the first V vectors of a chunk.
template <int R, int V>
void attend_pairs(const AttentionLayer& layer, const PairedChunk& chunk, int count, const PairedTile& tile, int begin,
                  const Sums& sums) {
  const int dim = layer.dim;
  alignas(64) float scores[R * CHUNK_LANES];
  alignas(64) Pair weights[R * CHUNK_LANES / PAIR];
  float shrink[R];
  score_pairs<R, V>(chunk.keys, dim / PAIR, tile.queries + begin * (dim / PAIR), scores);
  const Sums mine = {sums.most + begin, sums.weight + begin, sums.values + begin * dim};
  soften_pairs<R, V>(layer, chunk.first, count, tile.positions + begin, scores, mine, weights, shrink);
  const int pairs = (count + 1) / PAIR;
  int d = 0;
  for (; d + 3 * WIDE < dim; d += 4 * WIDE) weigh_pairs<R, 4>(chunk.values, pairs, dim, d, weights, shrink, mine.values);
  for (; d + WIDE < dim; d += 2 * WIDE) weigh_pairs<R, 2>(chunk.values, pairs, dim, d, weights, shrink, mine.values);
  if (d < dim) weigh_pairs<R, 1>(chunk.values, pairs, dim, d, weights, shrink, mine.values);
}

template <int R>
void attend_rows(const AttentionLayer& layer, const PairedChunk& chunk, const PairedTile& tile, int begin,
                 const Sums& sums) {
  // Nobody here sees what lies behind the last row, and a result must not depend on what the next row sees.
  const int count = smaller(tile.positions[begin + R - 1] + 1 - chunk.first, chunk.count);
  if (count <= 0) return;
  if (count > 2 * WIDE) {
    attend_pairs<R, 4>(layer, chunk, count, tile, begin, sums);
  } else if (count > WIDE) {
    attend_pairs<R, 2>(layer, chunk, count, tile, begin, sums);
  } else {
    attend_pairs<R, 1>(layer, chunk, count, tile, begin, sums);
  }
}

// Fills `sums` with what the tile's rows see in one segment.
inline void attend_segment(const Keep<std::uint16_t>& keep, const Tile& tile, int segment, const Sums& sums) {
  const AttentionLayer& layer = keep.layer;
  for (int row = 0; row < tile.rows; ++row) sums.most[row] = NOTHING, sums.weight[row] = 0.0f;
  std::memset(sums.values, 0, sizeof(float) * tile.rows * layer.dim);
  PairedTile ready;
  ready.positions = tile.positions;
  ready.rows = tile.rows;
  for (int row = 0; row < tile.rows; ++row) {
    for (int d = 0; d < layer.dim; d += LANES) {
      const __m128bh halves = _mm256_cvtneps_pbh(reinterpret_cast<__m256>(load(tile.queries[row] + d)));
      std::memcpy(ready.queries + (row * layer.dim + d) / PAIR, &halves, sizeof halves);
    }
  }
  const int last = tile.positions[tile.rows - 1] + 1;
  const int first = layer.window > 0 ? larger(tile.positions[0] + 1 - layer.window, 0) : 0;
  const int pages = chunk_pages(keep.lanes);
  PairedChunk chunk;
  for (int number = segment * SEGMENT_CHUNKS; number < (segment + 1) * SEGMENT_CHUNKS; ++number) {
    const int begin = number * pages * keep.page_tokens;
    if (begin >= last) return;
    if (begin + pages * keep.page_tokens <= first) continue;
    lay_out(keep, number * pages, first, last, chunk);
    int row = 0;
    for (; row + PAIRS_ROWS <= tile.rows; row += PAIRS_ROWS) attend_rows<PAIRS_ROWS>(layer, chunk, ready, row, sums);
    switch (tile.rows - row) {
      case 5: attend_rows<5>(layer, chunk, ready, row, sums); break;
      case 4: attend_rows<4>(layer, chunk, ready, row, sums); break;
      case 3: attend_rows<3>(layer, chunk, ready, row, sums); break;
      case 2: attend_rows<2>(layer, chunk, ready, row, sums); break;
      case 1: attend_rows<1>(layer, chunk, ready, row, sums); break;
      default: break;
    }
  }
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
