// One instruction set's engine: every pass for every dtype. Included once by each isa_*.cpp, which names VISATTN_ISA.
#pragma once

#include "engine.h"
#include "forward.h"
#include "weights.h"

namespace visattn::cpu::VISATTN_ISA {

template <class T>
Work plan_as(const Call& call, Pass pass, int threads) {
  switch (pass) {
    case Pass::kForward:
    case Pass::kStatistics:
      return Forward<T>::plan(call, pass, threads);
    case Pass::kDelta:
      return {call.problem.batch * call.problem.queries.h, 0, 0};
    case Pass::kGradQueries:
      return GradQueries<T>::plan(call, threads);
    case Pass::kGradKeys:
    case Pass::kGradTogether:
      return GradKeys<T>::plan(call, pass, threads);
    case Pass::kMap:
      return MapRows<T>::plan(call, threads);
    case Pass::kReceived:
      return Received<T>::plan(call, threads);
  }
  return {0, 0, 0};
}

template <class T>
void run_as(const Call& call, Pass pass, int threads, int64_t item, void* scratch) {
  const Arena arena{(char*)scratch};
  switch (pass) {
    case Pass::kForward:
    case Pass::kStatistics:
      return Forward<T>::run(call, pass, threads, item, arena);
    case Pass::kDelta:
      return run_delta<T>(call, item);
    case Pass::kGradQueries:
      return GradQueries<T>::run(call, threads, item, arena);
    case Pass::kGradKeys:
    case Pass::kGradTogether:
      return GradKeys<T>::run(call, pass, threads, item, arena);
    case Pass::kMap:
      return MapRows<T>::run(call, threads, item, arena);
    case Pass::kReceived:
      return Received<T>::run(call, threads, item, arena);
  }
}

#if defined(__AVX512BF16__)  // this engine differs from plain AVX-512 in bfloat16 alone
#define VISATTN_BY_DTYPE(CALL) return CALL(bf16)
#else
#define VISATTN_BY_DTYPE(CALL)  \
  switch (call.problem.dtype) { \
    case Dtype::kFloat64:       \
      return CALL(double);      \
    case Dtype::kFloat32:       \
      return CALL(float);       \
    case Dtype::kBFloat16:      \
      return CALL(bf16);        \
    case Dtype::kFloat16:       \
      return CALL(f16);         \
  }                             \
  __builtin_unreachable()
#endif

inline Work plan(const Call& call, Pass pass, int threads) {
#define VISATTN_PLAN(T) plan_as<T>(call, pass, threads)
  VISATTN_BY_DTYPE(VISATTN_PLAN);
}

inline void run(const Call& call, Pass pass, int threads, int64_t item, void* scratch) {
#define VISATTN_RUN(T) run_as<T>(call, pass, threads, item, scratch)
  VISATTN_BY_DTYPE(VISATTN_RUN);
}

}  // namespace visattn::cpu::VISATTN_ISA
