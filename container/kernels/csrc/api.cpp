// The C interface that Python calls: choice of the instruction set, teams, operators one by one for tests.
//
// Callers hand over addresses and sizes that they have checked; nothing here is reachable with a client's numbers.
#include "operators.hpp"

#include <cstring>

namespace strongroom {

#define STRONGROOM_DECLARE(isa) \
  namespace isa {               \
  extern const Operators operators; \
  }
STRONGROOM_DECLARE(plain)
#if defined(__x86_64__)
STRONGROOM_DECLARE(avx2)
STRONGROOM_DECLARE(avx512)
STRONGROOM_DECLARE(avx512bf16)
#endif

namespace {

// Widest first. `limit` names the set to stop at, for tests; null or unknown: the machine decides.
const Operators* choose(const char* limit) {
  bool reached = limit == nullptr;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool narrow =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool wide = narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni");
  reached = reached || std::strcmp(limit, avx512bf16::operators.name) == 0;
  if (reached && wide && __builtin_cpu_supports("avx512bf16")) return &avx512bf16::operators;
  reached = reached || std::strcmp(limit, avx512::operators.name) == 0;
  if (reached && wide) return &avx512::operators;
  reached = reached || std::strcmp(limit, avx2::operators.name) == 0;
  if (reached && narrow) return &avx2::operators;
#endif
  return &plain::operators;
}

struct Handle {
  Handle(const Operators* chosen, int threads) : operators(chosen), team(threads) {}
  const Operators* operators;
  Team team;
};

}  // namespace
}  // namespace strongroom

using namespace strongroom;

#pragma GCC visibility push(default)
extern "C" {

void* strongroom_open(const char* isa, std::int32_t threads) { return new Handle(choose(isa), threads); }

void strongroom_close(void* handle) { delete static_cast<Handle*>(handle); }

const char* strongroom_isa(void* handle) { return static_cast<Handle*>(handle)->operators->name; }

void strongroom_attention(void* handle, const AttentionLayer* layer, const Paging* paging, const Row* rows,
                          std::int32_t row_count, const float* qkv, float* out, float* scratch,
                          std::int64_t scratch_floats) {
  auto* opened = static_cast<Handle*>(handle);
  opened->team.run([&](Member& member) {
    opened->operators->attention(member, *layer, *paging, rows, row_count, qkv, out, scratch, scratch_floats);
  });
}

void strongroom_quantize(void* handle, std::int32_t kind, const float* x, std::int32_t tokens, std::int32_t inputs,
                         Activations to) {
  auto* opened = static_cast<Handle*>(handle);
  opened->team.run(
      [&](Member& member) { opened->operators->quantize(member, static_cast<Kind>(kind), x, tokens, inputs, to); });
}

void strongroom_multiply(void* handle, const BlockWeight* weight, Activations x, std::int32_t tokens, float* y,
                         std::int64_t stride) {
  auto* opened = static_cast<Handle*>(handle);
  opened->team.run([&](Member& member) { opened->operators->multiply(member, *weight, x, tokens, y, stride); });
}

void strongroom_multiply_plain(void* handle, const BlockWeight* weight, const float* x, std::int32_t tokens, float* y,
                               std::int64_t stride) {
  auto* opened = static_cast<Handle*>(handle);
  opened->team.run(
      [&](Member& member) { opened->operators->multiply_plain(member, *weight, x, tokens, y, stride); });
}

void strongroom_forward(void* handle, const Decoder* decoder, const DecoderStep* step, const Scratch* scratch) {
  auto* opened = static_cast<Handle*>(handle);
  opened->team.run(
      [&](Member& member) { opened->operators->forward(member, *decoder, *step, *scratch); });
}

}  // extern "C"
#pragma GCC visibility pop
