// Queries of one sequence against its pages, for one instruction set. See attention.hpp.
//
// A tile is a list of query rows that read the same kv head, in order of their positions. Its keys come in chunks of
// 64 lanes at fixed positions; six rows at a time are multiplied with a chunk, so that their sums stay in registers.

namespace strongroom {
namespace STRONGROOM_ISA {

constexpr int TILE_ROWS = 48;
constexpr int BLOCK_ROWS = 6;      // x 2 vectors: 12 sums, 2 operands, 1 factor of 16 registers
#if defined(__AVX512VL__)
constexpr int BLOCK_VECTORS = 4;   // 24 sums, 4 operands, 1 factor of 32 registers
#else
constexpr int BLOCK_VECTORS = 2;
#endif
constexpr int CHUNK_LANES = 64;
constexpr int SEGMENT_CHUNKS = 4;
constexpr float NOTHING = -3.4e38f;  // a maximum over no keys: finite, so that differences of two of them are 0

struct Tile {
  const float* queries[TILE_ROWS];
  float* out[TILE_ROWS];
  int positions[TILE_ROWS];
  int rows;
};

// What a tile knows of the keys it has seen: per row the largest score, the sum of weights, the weighted values.
struct Sums {
  float* most;
  float* weight;
  float* values;  // (rows, dim)
};

// A chunk's pages as the products read them: E is float once a chunk was converted for several blocks of rows.
template <class E>
struct Chunk {
  const E* keys[CHUNK_LANES / LANES];
  const E* values[CHUNK_LANES / LANES];
  const float* key_scales[CHUNK_LANES / LANES];  // int8 only
  const float* value_scales[CHUNK_LANES / LANES];
  int first;  // position of the first key
  int pages;
  // What is read next, to be fetched meanwhile: a page's part is too short a run for the machine to foresee it.
  const char* next_keys[CHUNK_LANES / LANES];
  const char* next_values[CHUNK_LANES / LANES];
  int next_pages;
};

constexpr int LINE_BYTES = 64;

inline void fetch(const char* from, int bytes) {
  for (int at = 0; at < bytes; at += LINE_BYTES) __builtin_prefetch(from + at, 0, 2);
}

inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }
inline int clamp(int value, int low, int high) { return larger(low, smaller(value, high)); }

// Adds the products of R factors and V vectors. The fewer of the two are held in registers beside the sums: with
// 12 sums of 16 registers there are four left.
template <int R, int V, class Factor, class Vector>
inline __attribute__((always_inline)) void add_products(f8 (&sums)[R][V], Factor&& factor, Vector&& vector) {
  if constexpr (R < V) {
    f8 factors[R];
    for (int r = 0; r < R; ++r) factors[r] = factor(r);
    for (int v = 0; v < V; ++v) {
      const f8 value = vector(v);
      for (int r = 0; r < R; ++r) sums[r][v] += factors[r] * value;
    }
  } else {
    f8 values[V];
    for (int v = 0; v < V; ++v) values[v] = vector(v);
    for (int r = 0; r < R; ++r) {
      const f8 factor_of_row = factor(r);
      for (int v = 0; v < V; ++v) sums[r][v] += factor_of_row * values[v];
    }
  }
}

// Products of R queries with V * 8 keys; `keys` says where each eight begin.
template <int R, int V, class E>
inline __attribute__((always_inline)) void score(const E* const* keys, int dim, int lanes, const float* const* queries,
                                                 float* scores) {
  f8 sums[R][V] = {};
  for (int d = 0; d < dim; ++d) {
    add_products<R, V>(sums, [&](int r) { return splat(queries[r][d]); },
                       [&](int v) { return load8(keys[v] + d * lanes); });
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(scores + r * CHUNK_LANES + v * LANES, sums[r][v]);
  }
}

// What lies outside of [first, last) becomes minus infinity; `lane` is the number of the first lane.
inline f8 within(f8 scores, int lane, int first, int last) {
  const i8 number = i8{0, 1, 2, 3, 4, 5, 6, 7} + lane;
  return (number >= first) & (number < last) ? scores : splat(-__builtin_inff());
}

// The pages, and in them the positions, that a block of rows looks at.
struct Reach {
  int first;  // position
  int last;
  int first_page;  // of the chunk
  int last_page;
};

// Adds V * 8 elements of the chunk's values, weighted, to R rows.
template <int R, int V, class E>
inline __attribute__((always_inline)) void weigh(const Chunk<E>& chunk, const Reach& reach, int page_tokens, int lanes,
                                                 int dim, int d, const float* weights, const float* shrink,
                                                 float* values) {
  f8 sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = load(values + r * dim + d + v * LANES) * splat(shrink[r]);
  }
  for (int page = reach.first_page; page < reach.last_page; ++page) {
    const int start = chunk.first + page * page_tokens;
    const int last = smaller(reach.last - start, page_tokens);
    const E* from = chunk.values[page] + d;
    const float* weight = weights + page * lanes;
    for (int at = larger(reach.first - start, 0); at < last; ++at) {
      add_products<R, V>(sums, [&](int r) { return splat(weight[r * CHUNK_LANES + at]); },
                         [&](int v) { return load8(from + at * dim + v * LANES); });
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) store(values + r * dim + d + v * LANES, sums[r][v]);
  }
}

// Turns R rows of products into weights and takes them into the rows' sums; `shrink` is what older sums are worth.
template <int R, bool SCALED, class E>
inline void soften(const AttentionLayer& layer, const Chunk<E>& chunk, const Reach& reach, int page_tokens, int lanes,
                   const int* positions, float* scores, const Sums& sums, float* shrink) {
  float most[R];
  f8 fall = {};
  for (int r = 0; r < R; ++r) {
    const int last = positions[r] + 1;
    const int first = layer.window > 0 ? last - layer.window : 0;
    float* row = scores + r * CHUNK_LANES;
    f8 biggest = splat(NOTHING);
    for (int page = reach.first_page; page < reach.last_page; ++page) {
      const int start = chunk.first + page * page_tokens;
      const int end = smaller(last - start, page_tokens);
      for (int lane = 0; lane < lanes; lane += LANES) {
        float* at = row + page * lanes + lane;
        f8 value = load(at) * splat(layer.scale);
        if (SCALED) value *= load(chunk.key_scales[page] + lane);
        if (first - start > lane || end < lane + LANES) value = within(value, lane, first - start, end);
        biggest = max(value, biggest);
        store(at, value);
      }
    }
    most[r] = largest(biggest);
    most[r] = most[r] > sums.most[r] ? most[r] : sums.most[r];
    fall[r] = sums.most[r] - most[r];
    sums.most[r] = most[r];
  }
  const f8 worth = exp(fall);
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * CHUNK_LANES;
    f8 total = {};
    for (int page = reach.first_page; page < reach.last_page; ++page) {
      for (int lane = 0; lane < lanes; lane += LANES) {
        float* at = row + page * lanes + lane;
        f8 weight = exp(load(at) - splat(most[r]));
        total += weight;
        if (SCALED) weight *= load(chunk.value_scales[page] + lane);
        store(at, weight);
      }
    }
    shrink[r] = worth[r];
    sums.weight[r] = sums.weight[r] * worth[r] + sum(total);
  }
}

// R rows, from row `begin` of the tile, against one chunk.
template <int R, bool SCALED, class E>
void attend_block(const AttentionLayer& layer, const Chunk<E>& chunk, int page_tokens, int lanes, const Tile& tile,
                  int begin, const Sums& sums) {
  const int* positions = tile.positions + begin;
  Reach reach;
  reach.first = layer.window > 0 ? larger(positions[0] + 1 - layer.window, chunk.first) : chunk.first;
  reach.last = smaller(positions[R - 1] + 1, chunk.first + chunk.pages * page_tokens);
  if (reach.first >= reach.last) return;
  reach.first_page = (reach.first - chunk.first) / page_tokens;
  reach.last_page = (reach.last - chunk.first + page_tokens - 1) / page_tokens;
  alignas(32) float scores[R * CHUNK_LANES];
  // Enough sums at once to hide the latency of a multiplication.
  constexpr int WIDE = R <= BLOCK_ROWS / 2 ? 4 : BLOCK_VECTORS;
  const int vectors = lanes / LANES;
  const int end = reach.last_page * vectors;
  for (int at = reach.first_page * vectors; at < end;) {
    const int count = end - at >= WIDE ? WIDE : end - at >= 2 ? 2 : 1;
    const E* keys[WIDE];
    for (int v = 0; v < count; ++v) {
      const int page = (at + v) / vectors;
      const int lane = (at + v) % vectors * LANES;
      keys[v] = chunk.keys[page] + lane;
      if (lane == 0 && page < chunk.next_pages) {
        fetch(chunk.next_keys[page], lanes * layer.dim * static_cast<int>(sizeof(E)));
        fetch(chunk.next_values[page], page_tokens * layer.dim * static_cast<int>(sizeof(E)));
      }
    }
    float* to = scores + at * LANES;
    if (count == WIDE) {
      score<R, WIDE>(keys, layer.dim, lanes, tile.queries + begin, to);
    } else if (count == 2) {
      score<R, 2>(keys, layer.dim, lanes, tile.queries + begin, to);
    } else {
      score<R, 1>(keys, layer.dim, lanes, tile.queries + begin, to);
    }
    at += count;
  }
  const Sums mine = {sums.most + begin, sums.weight + begin, sums.values + begin * layer.dim};
  float shrink[R];
  soften<R, SCALED>(layer, chunk, reach, page_tokens, lanes, positions, scores, mine, shrink);
  int d = 0;
  for (; d + WIDE * LANES <= layer.dim; d += WIDE * LANES) {
    weigh<R, WIDE>(chunk, reach, page_tokens, lanes, layer.dim, d, scores, shrink, mine.values);
  }
  for (; d + 2 * LANES <= layer.dim; d += 2 * LANES) {
    weigh<R, 2>(chunk, reach, page_tokens, lanes, layer.dim, d, scores, shrink, mine.values);
  }
  if (d < layer.dim) weigh<R, 1>(chunk, reach, page_tokens, lanes, layer.dim, d, scores, shrink, mine.values);
}

template <bool SCALED, class E>
void attend_chunk(const AttentionLayer& layer, const Chunk<E>& chunk, int page_tokens, int lanes, const Tile& tile,
                  const Sums& sums) {
  int row = 0;
  for (; row + BLOCK_ROWS <= tile.rows; row += BLOCK_ROWS) {
    attend_block<BLOCK_ROWS, SCALED>(layer, chunk, page_tokens, lanes, tile, row, sums);
  }
  switch (tile.rows - row) {
    case 5: return attend_block<5, SCALED>(layer, chunk, page_tokens, lanes, tile, row, sums);
    case 4: return attend_block<4, SCALED>(layer, chunk, page_tokens, lanes, tile, row, sums);
    case 3: return attend_block<3, SCALED>(layer, chunk, page_tokens, lanes, tile, row, sums);
    case 2: return attend_block<2, SCALED>(layer, chunk, page_tokens, lanes, tile, row, sums);
    case 1: return attend_block<1, SCALED>(layer, chunk, page_tokens, lanes, tile, row, sums);
    default: return;
  }
}

// Converts `count` elements, a multiple of 8.
template <class T>
inline void convert(const T* from, int count, float* to) {
  for (int at = 0; at < count; at += LANES) store(to + at, load8(from + at));
}

inline int chunk_pages(int lanes) { return CHUNK_LANES / lanes; }

inline int segment_tokens(const Paging& paging) {
  const int lanes = (paging.page_tokens + LANES - 1) / LANES * LANES;
  return SEGMENT_CHUNKS * chunk_pages(lanes) * paging.page_tokens;
}

// The chunk converted to float in `scratch`, for tiles that read it several times.
template <class T>
Chunk<float> converted(const Chunk<T>& chunk, const AttentionLayer& layer, int page_tokens, int lanes, float* scratch) {
  Chunk<float> result;
  result.next_pages = 0;
  result.first = chunk.first;
  result.pages = chunk.pages;
  for (int page = 0; page < chunk.pages; ++page) {
    convert(chunk.keys[page], lanes * layer.dim, scratch);
    result.keys[page] = scratch;
    scratch += lanes * layer.dim;
    convert(chunk.values[page], page_tokens * layer.dim, scratch);
    result.values[page] = scratch;
    scratch += page_tokens * layer.dim;
    result.key_scales[page] = chunk.key_scales[page];
    result.value_scales[page] = chunk.value_scales[page];
  }
  return result;
}

// Fills `sums` with what the tile's rows see in one segment.
template <class T>
void attend_segment(const Keep<T>& keep, const Tile& tile, int segment, const Sums& sums) {
  constexpr bool SCALED = sizeof(T) == 1;
  constexpr bool CONVERTED = sizeof(T) != sizeof(float);
  const AttentionLayer& layer = keep.layer;
  for (int row = 0; row < tile.rows; ++row) sums.most[row] = NOTHING, sums.weight[row] = 0.0f;
  std::memset(sums.values, 0, sizeof(float) * tile.rows * layer.dim);
  const int last = tile.positions[tile.rows - 1] + 1;
  const int first = layer.window > 0 ? larger(tile.positions[0] + 1 - layer.window, 0) : 0;
  const int pages = chunk_pages(keep.lanes);
  alignas(32) float scratch[CONVERTED ? 2 * CHUNK_LANES * ATTENTION_MAX_DIM : 1];
  for (int number = segment * SEGMENT_CHUNKS; number < (segment + 1) * SEGMENT_CHUNKS; ++number) {
    Chunk<T> chunk;
    const int first_page = number * pages;
    chunk.first = first_page * keep.page_tokens;
    if (chunk.first >= last) return;
    if (chunk.first + pages * keep.page_tokens <= first) continue;
    chunk.pages = smaller(pages, (last - chunk.first + keep.page_tokens - 1) / keep.page_tokens);
    for (int page = 0; page < chunk.pages; ++page) {
      const Part<T> part = keep.part(first_page + page);
      chunk.keys[page] = part.keys;
      chunk.values[page] = part.values;
      chunk.key_scales[page] = part.key_scales;
      chunk.value_scales[page] = part.value_scales;
    }
    chunk.next_pages = 0;
    if (tile.rows <= BLOCK_ROWS) {  // more rows compute longer than they wait
      const int next = first_page + pages;
      chunk.next_pages = clamp((last + keep.page_tokens - 1) / keep.page_tokens - next, 0, pages);
      for (int page = 0; page < chunk.next_pages; ++page) {
        const Part<T> part = keep.part(next + page);
        chunk.next_keys[page] = reinterpret_cast<const char*>(part.keys);
        chunk.next_values[page] = reinterpret_cast<const char*>(part.values);
      }
    }
    if (CONVERTED && tile.rows > BLOCK_ROWS) {
      const Chunk<float> ready = converted(chunk, layer, keep.page_tokens, keep.lanes, scratch);
      attend_chunk<SCALED>(layer, ready, keep.page_tokens, keep.lanes, tile, sums);
    } else {
      attend_chunk<SCALED>(layer, chunk, keep.page_tokens, keep.lanes, tile, sums);
    }
  }
}

// Takes a segment's sums into the rows' results so far; `opening` says that there are none.
inline void merge(const Tile& tile, int dim, const Sums& segment, bool opening, float* most, float* weight) {
  for (int row = 0; row < tile.rows; ++row) {
    float* out = tile.out[row];
    const float* values = segment.values + row * dim;
    if (opening) {
      most[row] = segment.most[row];
      weight[row] = segment.weight[row];
      std::memcpy(out, values, sizeof(float) * dim);
      continue;
    }
    const float peak = most[row] > segment.most[row] ? most[row] : segment.most[row];
    const f8 factors = exp(f8{most[row] - peak, segment.most[row] - peak});
    for (int d = 0; d < dim; d += LANES) {
      store(out + d, load(out + d) * splat(factors[0]) + load(values + d) * splat(factors[1]));
    }
    weight[row] = weight[row] * factors[0] + segment.weight[row] * factors[1];
    most[row] = peak;
  }
}

inline void normalize(const Tile& tile, int dim, const float* weight) {
  for (int row = 0; row < tile.rows; ++row) {
    const f8 inverse = splat(1.0f / weight[row]);
    for (int d = 0; d < dim; d += LANES) store(tile.out[row] + d, load(tile.out[row] + d) * inverse);
  }
}

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
