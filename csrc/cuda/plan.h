// What a launch of the CUDA kernels is: how near positions are cut into blocks, and what lies where in shared memory.
// Host and device; no torch, no CUDA header.
#pragma once

#include "../problem.h"

namespace visattn::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kNear = 16 * kWarps;

enum class Pass : int { kForward, kQueries, kKeys, kDelta };

// What a kernel can add to scores and values. Each has all that the one before it has.
enum class Kind : int {
  kPlain,    // nothing, and every query of a region sees every key of it
  kMasked,   // nothing
  kBias,     // RelativeBias, KeyBias
  kVectors,  // every term
};

// Slots of a stage: fewer where accumulators are many or numbers wide.
constexpr int slots_of(int bytes, int d, int dv, Pass pass) {
  return (pass != Pass::kForward && d + dv > 64 ? 128 : 256) / (2 * bytes);
}

struct Place {
  int y, x;  // indices of a region's lines
};

constexpr int kNowhere = -(1 << 30);  // the y of a row or slot that is no position

// A vector term in a kernel: near rows or slots have `lookup` numbers, their products with the entries of its tables,
// by the other side's coordinate, rows and then columns; what falls on each coordinate of far positions, of a near
// row, is in `sums`. Offsets in shared memory, -1 where there is none.
struct VectorPlan {
  int lookup = -1, lookup_h = 0, lookup_w = 0;
  int table = -1;  // entries of both axes, for slots to be multiplied with
  int sums = -1, sums_h = 0, sums_w = 0;
};

// What a launch knows beside its call.
struct Plan {
  bool packed = true;              // near positions in raster order of their region
  int warp_h = 1, warp_w = 16;     // else the box of a warp
  int64_t blocks_y = 1, blocks_x;  // blocks of a pair of classes
  int64_t tiles;                   // of one map
  int64_t deal;                    // blocks that share the tiles of a head
  int box_h, box_w;                // the largest box of far positions
  int own_h, own_w;                // the largest box around a block's near positions
  int reach[2];                    // K of each axis
  int entries_h, entries_w;        // of a bias table
  bool vector[4];                  // whether rows of near 1, near 2, far 1, far 2 are copied 16 bytes at a time
  int places = 0, near1 = 0, near2 = 0, stages = 0;
  int stage_bytes = 0, far2 = 0, far_places = 0, far_numbers = 0;  // within a stage: lse and delta, or key biases
  int bias = -1, bias_sums = -1, staged = -1;
  VectorPlan vectors[kVectorTerms];
  int64_t bytes = 0;
};

struct Args {
  Call call;
  Plan plan;
};

constexpr int64_t kMost = int64_t(1) << 30;  // of positions of a box, and of a side of anything

constexpr int kTileBytes = 512;  // of the tile, at the start of shared memory

// Where tables want gradients, tiles are dealt among so many blocks, and their shares take so many bytes at most,
// unless one share of each head is more. Fixed, so that bits do not depend on the device.
constexpr int64_t kShares = 1024, kSharesBytes = int64_t(1) << 26;

// The cut of one part of a call, before memory is laid out.
inline Plan cut_of(const Call& call, Pass pass) {
  const Problem& p = call.problem;
  const bool of_keys = pass == Pass::kKeys;
  const Part part = part_of(p.pattern, call.part, p.queries, p.keys);
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  Plan plan;
  for (int axis = 0; axis < 2; ++axis) plan.reach[axis] = int(least(p.reach(axis), kMost));
  plan.entries_h = int(table_entries(plan.reach[0])), plan.entries_w = int(table_entries(plan.reach[1]));
  const int64_t h = part.y.longest(of_keys ? p.keys.h : p.queries.h);
  const int64_t w = part.x.longest(of_keys ? p.keys.w : p.queries.w);
  plan.packed = !part.near();
  if (plan.packed) {
    plan.blocks_x = (h * w + kNear - 1) / kNear;
    plan.own_h = int(least(h, kNear));
    plan.own_w = int(h == 1 ? least(w, kNear) : w);
  } else {
    if (h > 1) plan.warp_h = w > 1 ? 2 : 16, plan.warp_w = w > 1 ? 8 : 1;
    plan.own_h = plan.warp_h * (plan.warp_h == 1 ? 1 : kWarps), plan.own_w = kNear / plan.own_h;
    plan.blocks_y = (h + plan.own_h - 1) / plan.own_h, plan.blocks_x = (w + plan.own_w - 1) / plan.own_w;
  }
  // A range of keys is at most the kernel longer than that of its queries; a range of queries twice that, where windows
  // pushed inside a border meet its keys.
  const auto far = [&](const Axis& axis, int64_t own, int64_t longest) {
    if (!axis.near()) return longest;
    const int64_t range = least(own - 1 + (of_keys ? 2 : 1) * axis.size, kMost);
    return axis.border == Border::kZero && !of_keys ? range : least(range, longest);
  };
  plan.box_h = int(far(part.y, plan.own_h, part.y.longest(of_keys ? p.queries.h : p.keys.h)));
  plan.box_w = int(far(part.x, plan.own_w, part.x.longest(of_keys ? p.queries.w : p.keys.w)));
  plan.tiles = part.classes() * plan.blocks_y * plan.blocks_x;
  plan.deal = plan.tiles * p.batch;
  if (call.partial_size > 0) {
    const int64_t heads = of_keys ? p.kv_heads : p.heads;
    const int64_t shares = least(kShares / heads, kSharesBytes / (4 * p.heads * call.partial_size));
    plan.deal = least(plan.deal, shares > 0 ? shares : 1);
  }
  return plan;
}

// Lay out shared memory for numbers of so many bytes and a kind of kernel.
inline void lay_out(Plan& plan, const Call& call, Pass pass, int number, int d, int dv, Kind kind) {
  const bool of_keys = pass == Pass::kKeys, backward = pass != Pass::kForward;
  const int slots = slots_of(number, d, dv, pass), pad = 16 / number;
  int64_t at = kTileBytes;
  const auto take = [&](int64_t bytes) {
    const int64_t offset = at;
    at += (bytes + 15) / 16 * 16;
    return int(offset);
  };
  plan.places = take(kNear * int64_t(sizeof(Place)));
  plan.near1 = take(kNear * (d + pad) * number);
  if (backward) plan.near2 = take(kNear * (dv + pad) * number);
  plan.stages = int(at);
  plan.far2 = slots * (d + pad) * number;
  plan.far_places = plan.far2 + slots * (dv + pad) * number;
  plan.far_numbers = plan.far_places + slots * int(sizeof(Place));
  plan.stage_bytes = plan.far_numbers + (of_keys ? 2 : kind >= Kind::kBias ? 1 : 0) * slots * 4;
  take(2 * plan.stage_bytes);
  if (kind < Kind::kBias) {
    plan.bytes = at;
    return;
  }
  const auto wants = [&](int slot) { return call.partial_size > 0 && call.wants_table(slot); };
  if (call.bias.data) {
    const int64_t all = int64_t(plan.entries_h) * plan.entries_w, entries = all < kMost ? all : kMost;
    plan.bias = take(entries * 4);
    if (backward && wants(0)) plan.bias_sums = take(entries * 4);
  }
  bool staged = plan.bias_sums >= 0;
  for (int t = 0; kind == Kind::kVectors && t < kVectorTerms; ++t) {
    const VectorTerm term = VectorTerm(t);
    if (!call.has_vector(term)) continue;
    VectorPlan& v = plan.vectors[t];
    const bool near = of_keys == (term == kKeyTerm), high = call.vector[t][0].data, wide = call.vector[t][1].data;
    const int width = term == kValueTerm ? dv : d;
    if (term != kValueTerm || backward) {
      v.lookup_h = high ? (near ? plan.box_h : plan.own_h) : 0;
      v.lookup_w = wide ? (near ? plan.box_w : plan.own_w) : 0;
      v.lookup = take(int64_t(near ? kNear : slots) * ((int64_t(v.lookup_h) + v.lookup_w) | 1) * 4);
      const auto rows = [&](int64_t n) { return (n + slots - 1) / slots * slots; };
      if (!near)
        v.table = take(((high ? rows(int64_t(plan.box_h) + plan.own_h - 1) : 0) +
                        (wide ? rows(int64_t(plan.box_w) + plan.own_w - 1) : 0)) *
                       (width + pad) * number);
    }
    // Of values the forward adds the tables' part; the gradient of a table wants the same sums.
    const bool gradient = wants(table_slot(term, 0)) || wants(table_slot(term, 1));
    if (near && (term == kValueTerm ? (backward ? gradient : true) : backward)) {
      v.sums_h = high ? plan.box_h : 0, v.sums_w = wide ? plan.box_w : 0;
      v.sums = take(int64_t(kNear) * ((int64_t(v.sums_h) + v.sums_w) | 1) * 4);
      staged = true;
    }
  }
  if (staged) plan.staged = take(int64_t(kNear) * (slots + 1) * 4);
  plan.bytes = at;
}

}  // namespace visattn::cuda
