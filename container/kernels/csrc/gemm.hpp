// Products with weights held as integers in blocks of 32 along the input.
//
// Weights lie in groups of 8 outputs, so that one vector holds four inputs of each of the 8:
//
//     values   (groups, inputs / 32, 8 quads, 8 outputs, 4 inputs)   int8, -127..127; outputs 0 1 4 5 2 3 6 7
//     scales   (groups, inputs / 32, 8 outputs)                      fp16
//
// Activations are quantized in the same blocks on the way in:
//
//     values   (tokens, inputs)        -127..127, held in 16 bits as the products take them
//     scales   (tokens, inputs / 32)   float32
//
// container/model/quantize_blocks.py defines the arithmetic; sums of blocks are exact, their order is ascending.
#pragma once

#include <cstdint>

#include "team.hpp"

namespace strongroom {

constexpr int BLOCK = 32;   // inputs that share a scale
constexpr int GROUP = 8;    // outputs computed together

struct Int8Weight {
  std::int32_t outputs;  // a multiple of GROUP; Python pads with zero rows
  std::int32_t inputs;   // a multiple of BLOCK
  const std::int8_t* values;
  const std::uint16_t* scales;
  const float* bias;     // (outputs) or null
};

struct Activations {
  std::int16_t* values;
  float* scales;
};

// Quantizes rows [0, tokens) of x (tokens, inputs), each by one thread. Ends without a barrier.
using Quantize = void(Member& member, const float* x, int tokens, int inputs, Activations to);

// y (tokens, stride) = x W^T + bias, its first `outputs` columns. Ends with a barrier.
using MultiplyInt8 = void(Member& member, const Int8Weight& weight, Activations x, int tokens, float* y,
                          std::int64_t stride);

// The same with activations as they are, for comparing a model with its plain form.
using MultiplyPlain = void(Member& member, const Int8Weight& weight, const float* x, int tokens, float* y,
                           std::int64_t stride);

}  // namespace strongroom
