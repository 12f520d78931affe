// Products with weights held as integers in blocks of 32 along the input.
//
// Weights lie in groups of 8 outputs, so that one vector holds four inputs of each of the 8, a quad:
//
//     int8   values   (groups, inputs / 32, 8 quads, 8 outputs, 4 inputs)   -127..127; outputs 0 1 4 5 2 3 6 7
//            scales   (groups, inputs / 32, 8 outputs)                      fp16
//     int4   values   (groups, inputs / 32, 4, 8 outputs, 4 inputs)         0..15; bytes, whose low halves are one
//                                                                           quad and whose high halves the next
//            scales, lows    as the scales of int8: a weight is scale * value + low
//
// Activations are quantized in the same blocks on the way in, as the weight's kind takes them:
//
//     values   (tokens, inputs)        -127..127; held in 16 bits for int8 below AVX-512, else in 8
//     scales   (tokens, inputs / 32)   float32
//     sums     (tokens, inputs / 32)   for int4 float32, scale * sum of values, which lows are multiplied with; for
//                                      int8 from AVX-512 on int32, -128 * sum of values, where products begin
//
// container/model/quantize_blocks.py defines the arithmetic; sums of blocks are exact, their order is ascending.
#pragma once

#include <cstdint>

#include "team.hpp"

namespace strongroom {

constexpr int BLOCK = 32;   // inputs that share a scale
constexpr int GROUP = 8;    // outputs computed together

enum class Kind : std::int32_t { INT8 = 0, INT4 = 1 };

struct BlockWeight {
  std::int32_t outputs;  // a multiple of GROUP; Python pads with zero rows
  std::int32_t inputs;   // a multiple of BLOCK
  Kind kind;
  const void* values;
  const std::uint16_t* scales;
  const std::uint16_t* lows;  // null for int8
  const float* bias;     // (outputs) or null
};

struct Activations {
  void* values;
  float* scales;
  float* sums;           // or the bits of int32; not touched for int8 below AVX-512
};

// Quantizes rows [0, tokens) of x (tokens, inputs), each by one thread. Ends without a barrier.
using Quantize = void(Member& member, Kind kind, const float* x, int tokens, int inputs, Activations to);

// y (tokens, stride) = x W^T + bias, its first `outputs` columns; x as quantized for the weight's kind. Ends with
// a barrier.
using Multiply = void(Member& member, const BlockWeight& weight, Activations x, int tokens, float* y,
                      std::int64_t stride);

// The same with activations as they are, for comparing a model with its plain form.
using MultiplyPlain = void(Member& member, const BlockWeight& weight, const float* x, int tokens, float* y,
                           std::int64_t stride);

}  // namespace strongroom
