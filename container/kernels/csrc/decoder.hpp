// A whole forward of a decoder of the common form, as few large operators over one team of threads.
//
//     x = embedding[token]
//     per layer   norm + quantize -> q k v -> (q, k norms) rotate -> pages, attention
//                 quantize -> output projection + x
//                 norm + quantize -> act(gate) * up -> quantize -> down projection + x
//     last norm of the wanted tokens -> logits
#pragma once

#include "attention.hpp"
#include "gemm.hpp"

namespace strongroom {

enum class Gate : std::int32_t { SILU = 0, GELU_TANH = 1 };

struct DecoderLayer {
  AttentionLayer attention;
  const float* attention_norm;  // (hidden)
  const float* mlp_norm;        // (hidden)
  const float* query_norm;      // (dim) or null
  const float* key_norm;        // (dim) or null
  BlockWeight qkv;              // outputs: all query heads, all key heads, all value heads
  BlockWeight output;
  BlockWeight gate_up;          // groups of 8 gates and 8 ups in turn
  BlockWeight down;
};

struct Decoder {
  std::int32_t hidden;
  std::int32_t intermediate;
  std::int32_t layer_count;
  std::int32_t vocabulary;
  std::int32_t rotated;         // leading elements of a head that are rotated, in halves
  Gate gate;
  float epsilon;                // of every norm
  std::int32_t plain;           // not 0: activations are not quantized
  const DecoderLayer* layers;
  const float* last_norm;
  const float* embedding;       // (vocabulary, hidden)
  const float* cosines;         // (positions, rotated / 2)
  const float* sines;
  BlockWeight head;             // outputs padded to a multiple of 8
  Paging paging;
};

struct Scratch {
  float* x;                     // (tokens, hidden)
  float* wide;                  // (tokens, the widest of qkv and intermediate)
  float* narrow;                // (tokens, heads * dim, or hidden)
  Activations quantized;        // (tokens, the widest input), room for 16 bits a value
  std::int64_t widest;          // inputs of any projection
  float* own_rows;              // (threads, widest)
  Activations own_quantized;    // (threads, widest)
  float* attention;             // see attention.hpp
  std::int64_t attention_floats;
};

struct DecoderStep {
  std::int32_t tokens;
  std::int32_t row_count;
  std::int32_t wanted_count;
  const std::int32_t* token_ids;  // (tokens)
  const std::int32_t* positions;  // (tokens), in their sequences
  const Row* rows;                // cover the tokens
  const std::int32_t* wanted;     // (wanted_count), indices of tokens
  float* logits;                  // (wanted_count, head.outputs)
};

// Collective; ends with a barrier.
using Forward = void(Member& member, const Decoder& decoder, const DecoderStep& step, const Scratch& scratch);

}  // namespace strongroom
