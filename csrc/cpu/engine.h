// The CPU engine as its callers see it: one table per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace visattn::cpu {

enum class Pass {
  kForward,     // out and lse of the queries
  kStatistics,  // maximum and inverse of the queries, for the two last passes
  kDelta,       // delta_i = out_i · grad_out_i - grad_lse_i
  kBackward,    // those of grad_q, grad_k and grad_v that have data
  kMap,         // weights of the queries `points`
  kReceived,    // column sums of the weights
};

constexpr int kBlock = 64;  // walked positions per block

// A pass is cut into items, to be taken in their order by any number of threads: each writes results of its own, or
// adds to shared ones in turn.
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
