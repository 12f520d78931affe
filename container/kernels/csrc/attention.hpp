// Causal attention of packed rows over paged keys and values.
//
// A page holds `page_tokens` positions of one sequence in all layers, as one run of bytes. In it, `key_offset` and
// `value_offset` (bytes, multiples of 64) say where this layer's part begins:
//
//     keys     (kv_heads, dim, lanes)         float32 | bfloat16 | int8; lanes: page_tokens rounded up to 8
//     values   (kv_heads, page_tokens, dim)   the same
//     scales   (kv_heads, lanes)              float32, int8 only: one per head and position, behind each of both
//
// Keys lie across, so that one load brings the same element of eight positions: scores need no sum over lanes,
// and a page is the panel that a blocked product wants. Padding lanes and positions nobody wrote are never used.
// Pages may be shared by sequences; what is shared is full and never written again.
//
// A query's result depends on its own sequence alone, bit for bit: not on other rows, on the number of threads,
// or on how its prompt was cut. Keys are summed in chunks at fixed positions, chunks in segments at fixed positions,
// and segments in order, whoever computes them.
#pragma once

#include <cstdint>

#include "team.hpp"

namespace strongroom {

enum class KVType : std::int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// Tokens [first, first + count) of the packed rows are positions [start, start + count) of one sequence.
struct Row {
  std::int32_t first;
  std::int32_t count;
  std::int32_t start;
  std::uint8_t* const* pages;  // page of position p: pages[p / page_tokens]
};

struct AttentionLayer {
  std::int32_t heads;
  std::int32_t kv_heads;
  std::int32_t dim;          // of a head, the same for keys and values; a multiple of 8, 256 at most
  std::int32_t window;       // positions a query sees, itself among them; 0: all
  float scale;
  std::int64_t key_offset;
  std::int64_t value_offset;
};

struct Paging {
  std::int32_t page_tokens;  // 64 at most
  KVType type;
};

constexpr int ATTENTION_MAX_DIM = 256;          // bounds the scratch on the stack: about 200 KiB
constexpr int ATTENTION_MAX_PAGE_TOKENS = 64;

// Writes the rows' own keys and values to their pages, then fills `out` (tokens, heads, dim).
//
// `qkv` is (tokens, heads + 2 * kv_heads, dim), rotated already; a sequence has one row at most. `scratch` lets
// threads share one long context: (segments + 1) * heads * (dim + 2) floats per row are enough, with none (or too
// few) a context is one thread's work. Collective; ends with a barrier.
using Attention = void(Member& member, const AttentionLayer& layer, const Paging& paging, const Row* rows,
                       int row_count, const float* qkv, float* out, float* scratch, std::int64_t scratch_floats);

}  // namespace strongroom
