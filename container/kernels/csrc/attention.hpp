// Causal attention of packed rows over paged keys and values.
//
// A page holds `page_tokens` positions of one sequence in all layers, as one run of bytes. In it, `key_offset` and
// `value_offset` (bytes) say where this layer's part begins:
//
//     keys     (kv_heads, page_tokens, dim)   float32 | bfloat16 | int8
//     values   (kv_heads, page_tokens, dim)   the same
//     scales   (kv_heads, page_tokens)        float32, int8 only: one per head and position, behind each of both
//
// Pages may be shared by sequences; what is shared is full and never written again.
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
  std::int32_t dim;          // of a head, the same for keys and values; a multiple of 8
  std::int32_t window;       // positions a query sees, itself among them; 0: all
  float scale;
  std::int64_t key_offset;
  std::int64_t value_offset;
};

struct Paging {
  std::int32_t page_tokens;
  KVType type;
};

// Writes the rows' own keys and values to their pages, then fills `out` (tokens, heads, dim).
//
// `qkv` is (tokens, heads + 2 * kv_heads, dim), rotated already. Collective; ends with a barrier.
using Attention = void(Member& member, const AttentionLayer& layer, const Paging& paging, const Row* rows,
                       int row_count, const float* qkv, float* out);

}  // namespace strongroom
