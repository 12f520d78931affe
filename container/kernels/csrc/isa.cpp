// Every operator, compiled for one instruction set: the build compiles this file once for each, with
// STRONGROOM_ISA naming it. Nothing of the standard library's containers belongs in here: code that the linker
// may share between the sets has to run on all machines.
#include "operators.hpp"
#include "vectors.hpp"

#include "attention.inl"
#include "blocks.inl"
#include "gemm.inl"
#include "decoder.inl"

namespace strongroom {
namespace STRONGROOM_ISA {

#define STRONGROOM_TEXT_OF(name) #name
#define STRONGROOM_TEXT(name) STRONGROOM_TEXT_OF(name)

extern const Operators operators;
const Operators operators = {STRONGROOM_TEXT(STRONGROOM_ISA), attention, quantize,
                             multiply_blocks, multiply_plain, forward};

}  // namespace STRONGROOM_ISA
}  // namespace strongroom
