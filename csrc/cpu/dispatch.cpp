// Which engine runs: decided once per call from the CPU's features, or forced by VISATTN_CPU_ISA.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "engine.h"

namespace visattn::cpu {

extern const Engine engine_plain;
#if defined(__x86_64__)
extern const Engine engine_avx2, engine_avx512, engine_avx512_bf16;
#endif

namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
  const Engine* engine;
  const Engine* bf16_engine;
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#if defined(VISATTN_EMULATE_AVX512)  // a build for tests: these engines need no more than AVX2
bool has_avx512() { return has_avx2(); }
bool has_avx512_bf16() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, &engine_avx512, &engine_avx512_bf16},
    {"avx512", has_avx512, &engine_avx512, &engine_avx512},
    {"avx2", has_avx2, &engine_avx2, &engine_avx2},
#endif
    {"plain", always, &engine_plain, &engine_plain},
};

const Isa& selected() {
  const char* forced = std::getenv("VISATTN_CPU_ISA");
  std::string known;
  for (const Isa& isa : kIsas) {
    if (!isa.runs_here()) continue;
    if (!forced || !*forced || std::string(forced) == isa.name) return isa;
    known += known.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::runtime_error("visattn: expected an instruction set of this CPU (" + known +
                           "), but got VISATTN_CPU_ISA=" + forced);
}

}  // namespace

const char* selected_isa() { return selected().name; }

const Engine& select_engine(Dtype dtype) {
  const Isa& isa = selected();
  return dtype == Dtype::kBFloat16 ? *isa.bf16_engine : *isa.engine;
}

}  // namespace visattn::cpu
