// The operators as function pointers, one table per instruction set.
#pragma once

#include "attention.hpp"

namespace strongroom {

struct Operators {
  const char* name;
  Attention* attention;
};

}  // namespace strongroom
