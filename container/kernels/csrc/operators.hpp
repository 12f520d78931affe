// The operators as function pointers, one table per instruction set.
#pragma once

#include "attention.hpp"
#include "decoder.hpp"
#include "gemm.hpp"

namespace strongroom {

struct Operators {
  const char* name;
  Attention* attention;
  Quantize* quantize;
  Multiply* multiply;
  MultiplyPlain* multiply_plain;
  Forward* forward;
};

}  // namespace strongroom
