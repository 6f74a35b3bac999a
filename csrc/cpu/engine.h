// The CPU engine as its callers see it: one table per instruction set, chosen at run time.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace visattn::cpu {

// Every pass is run for one part of the pattern after the other.
enum class Pass {
  kForward,       // out and lse of the queries
  kStatistics,    // maximum and inverse of the queries, for the two last passes
  kDelta,         // delta_i = out_i · grad_out_i - grad_lse_i; for the first part alone
  kGradQueries,   // grad_q, and shares of the gradients of RelativeBias, RelativeQuery and RelativeValue
  kGradKeys,      // grad_k, grad_v and grad_key_bias, and shares of those of RelativeKey
  kGradTogether,  // all of them in one pass, where `together` says so
  kMap,           // weights of the queries `points`
  kReceived,      // column sums of the weights
};

constexpr int kBlock = 64;  // walked positions per block

// A pass is cut into items, to be taken in their order by any number of threads: each writes results of its own, or
// adds to shared ones in turn.
struct Work {
  int64_t items;
  int64_t scratch_bytes;  // per thread, 64-byte aligned
  int64_t shares;         // shares of the gradients of tables: the n-th is of head n % heads
};

struct Engine {
  Work (*plan)(const Call&, Pass, int threads);
  void (*run)(const Call&, Pass, int threads, int64_t item, void* scratch);
};

// Whether one pass gives every gradient: with keys resident and queries walked, tile after tile adds to the gradient of
// q, for which a tile must see all queries of its region.
VISATTN_HD bool together(const Call& call) {
  const Problem& p = call.problem;
  return !part_of(p.pattern, call.part, p.queries, p.keys).near();
}

// Counters of turns that kGradTogether needs for one map and head.
VISATTN_HD int64_t turns(const Call& call) {
  const Problem& p = call.problem;
  const Part part = part_of(p.pattern, call.part, p.queries, p.keys);
  const int64_t longest = part.y.longest(p.queries.h) * part.x.longest(p.queries.w);
  return part.classes() * ((longest + kBlock - 1) / kBlock);
}

// The instruction set in use: the best this CPU runs, or the one named by the environment variable VISATTN_CPU_ISA.
// Throws std::runtime_error if that names none that can run here.
const char* selected_isa();

// The engine for a dtype under the selected instruction set.
const Engine& select_engine(Dtype dtype);

}  // namespace visattn::cpu
