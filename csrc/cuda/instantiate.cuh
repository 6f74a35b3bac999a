// The cells of one dtype, pass, D and Dv. Included by generated files of a few lines, after
//
//     #define VISATTN_ELEMENT   Half, BFloat16, float or Tf32
//     VISATTN_PASS       kForward, kQueries, kKeys or kDelta
//     VISATTN_CELLS      {D, Dv, kind} of each: X(8, 32, kPlain) X(...) ...; for kDelta nothing
//     VISATTN_TABLE      the name of the function that gives the table
#include "backward.cuh"
#include "cuda.h"
#include "forward.cuh"

namespace visattn::cuda {

static_assert(sizeof(Tile) <= kTileBytes, "plan.h leaves less room for a tile than it takes");

template <class E, Pass kPass, int kD, int kDv, Kind kKind>
const char* launch_cell(const Call& call, const Plan& plan, void* stream) {
  const Args args{call, plan};
  if constexpr (kPass == Pass::kDelta) {
    const Problem& p = call.problem;
    const int64_t queries = p.batch * p.queries.size() * p.heads;
    return launch(delta_kernel<typename Element<E>::T>, args, (queries + kWarps - 1) / kWarps, kThreads, 0, stream);
  } else {
    using C = Cell<E, kD, kDv, kKind>;
    const int64_t heads = kPass == Pass::kKeys ? call.problem.kv_heads : call.problem.heads;
    if constexpr (kPass == Pass::kForward)
      return launch(forward_kernel<C>, args, plan.deal * heads, kThreads, size_t(plan.bytes), stream);
    else
      return launch(backward_kernel<C, kPass>, args, plan.deal * heads, kThreads, size_t(plan.bytes), stream);
  }
}

const Entry* VISATTN_TABLE() {
  static const Entry table[] = {
#define X(d, dv, kind) {d, dv, Kind::kind, launch_cell<VISATTN_ELEMENT, Pass::VISATTN_PASS, d, dv, Kind::kind>},
      VISATTN_CELLS
#undef X
      {0, 0, Kind::kPlain, nullptr}};
  return table;
}

}  // namespace visattn::cuda
