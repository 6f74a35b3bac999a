// The CPU engine as its callers see it: one table per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace visattn::cpu {

enum class Pass {
  kForward,     // out and lse of the queries
  kStatistics,  // maximum and inverse of the queries, for the two last passes
  kDelta,       // delta_i = out_i · grad_out_i - grad_lse_i
  kGradQuery,
  kGradKeyValue,
  kMap,       // weights of the queries `points`
  kReceived,  // column sums of the weights
};

// A pass is cut into items that write disjoint results and can run in any order on any thread.
struct Work {
  int64_t items;
  int64_t scratch_bytes;  // per thread, 64-byte aligned
};

struct Engine {
  Work (*plan)(const Call&, Pass, int threads);
  void (*run)(const Call&, Pass, int threads, int64_t item, void* scratch);
};

// The instruction set in use: the best this CPU runs, or the one named by the environment variable VISATTN_CPU_ISA.
// Throws std::runtime_error if that names none that can run here.
const char* selected_isa();

// The engine for a dtype under the selected instruction set.
const Engine& select_engine(Dtype dtype);

}  // namespace visattn::cpu
