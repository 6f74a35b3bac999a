// Backward: weights are computed again from lse.
//
//     P = e^(S - lse)      dP = dO V^T      dS = P * (dP - delta)      delta_i = out_i · dO_i - dlse_i
//
//     dV[j] = sum_i P dO_i      dK[j] = scale * sum_i dS q_i      dQ[i] = scale * sum_j dS k_j       5 products
//
// Keys resident (GradKeys): dV and dK are sums over the walk and stay with the tile. dQ is a sum over tiles. Where a
// tile sees all queries of its region it adds its share to a running sum in memory, block after block, in the order of
// the tiles: a counter per block says whose turn it is, so that no two threads add at once and the order of additions,
// hence every bit, is the same however keys are cut into tiles. Tiles are handed out in their order, so a tile waits
// only for tiles that are being worked on: there is no deadlock.
//
// Elsewhere dQ has a pass of its own, with queries resident (GradQueries), of 3 products.
//
// RelativeQuery: dQ += scale * G rel and drel += scale * G^T q, with G the sums of dS by a query's offsets; RelativeKey
// likewise by a key's. RelativeValue: drel += U^T dO, with U the sums of P.
//
// Gradients of tables are summed per item into a share of their own; shares are added in their order afterwards.
#pragma once

#include <sched.h>

#include "scores.h"

namespace visattn::cpu::VISATTN_ISA {

// delta of one row of one map. Summed in double: dP - delta cancels, and this is a small share of the work.
template <class T>
void run_delta(const Call& call, int64_t item) {
  using Acc = typename Arithmetic<T>::Type::Acc;
  constexpr int W = kLanes<Acc>;
  const Problem& p = call.problem;
  const int64_t b = item / p.queries.h, y = item % p.queries.h;
  for (int64_t x = 0; x < p.queries.w; ++x)
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* out = at<T>(call.out, b, h) + y * call.out.y + x * call.out.x;
      const T* grad = at<T>(call.grad_out, b, h) + y * call.grad_out.y + x * call.grad_out.x;
      double sum = 0;
      int64_t c = 0;
      if (call.out.channel == 1 && call.grad_out.channel == 1) {
        double lanes[W] = {};
        for (; c < p.value_dim; c += W) {
          const Vec<Acc> a = load_some<Acc>(out + c, p.value_dim - c), g = load_some<Acc>(grad + c, p.value_dim - c);
          for (int i = 0; i < W; ++i) lanes[i] += double(a[i]) * double(g[i]);
        }
        for (int i = 0; i < W; ++i) sum += lanes[i];
      }
      for (; c < p.value_dim; ++c)
        sum += double(widen(out[c * call.out.channel])) * double(widen(grad[c * call.grad_out.channel]));
      at_mutable<Acc>(call.delta, b, h)[y * call.delta.y + x * call.delta.x] =
          Acc(sum) - at<Acc>(call.grad_lse, b, h)[y * call.grad_lse.y + x * call.grad_lse.x];
    }
}

// A query's lse; infinity for a query with no key, so that its weights are 0.
template <class Acc>
VISATTN_INLINE Acc weighting_lse(Acc lse) {
  return lse == -Acc(__builtin_inf()) ? Acc(__builtin_inf()) : lse;
}

// A score to its weight P, and dP to dS, in place. What is masked counts for nothing, whatever it holds.
template <class Acc>
VISATTN_INLINE void differentiate(Acc* score, Acc* grad, Vec<Acc> lse, Vec<Acc> delta, bool want_scores, bool guarded) {
  const Vec<Acc> s = load(score);
  const auto masked = s == -Acc(__builtin_inf());
  Vec<Acc> weight = exp(s - lse);
  if (guarded) weight = masked ? Vec<Acc>{} : weight;
  store(score, weight);
  if (!want_scores) return;
  Vec<Acc> ds = weight * (load(grad) - delta);
  if (guarded) ds = masked ? Vec<Acc>{} : ds;
  store(grad, ds);
}

// Where a share's tables begin, all zero.
template <class Acc>
VISATTN_INLINE Acc* start_share(const Call& call, int64_t index) {
  if (!call.partials) return nullptr;
  Acc* share = (Acc*)call.partials + index * call.partial_size;
  for (int64_t i = 0; i < call.partial_size; ++i) share[i] = 0;
  return share;
}

template <class T>
struct GradQueries {
  using Walker = Walk<T>;
  using M = typename Walker::M;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  struct Scratch {
    Walker walk;
    Elem *grads, *key_sums, *values, *weights;
    Acc *grad_weights, *lse, *delta, *rows, *grad_rows;
    int64_t* walked;
    LaneTerm<M> value[2];
    BlockSums<M> grad;

    Scratch(Arena& arena, const Call& call, int threads)
        : walk(arena, call, true, threads, call.partial_size > 0, true, false),
          grads(arena.take<Elem>(kPanels * panel_elements<M>(call.problem.value_dim))),
          key_sums(arena.take<Elem>(staged_elements<M>(call.problem.head_dim))),
          values(arena.take<Elem>(staged_elements<M>(call.problem.value_dim))),
          weights(arena.take<Elem>(kBlock / 2 * L)),
          grad_weights(arena.take<Acc>(kBlock * L)),
          lse(arena.take<Acc>(kPanels * L)),
          delta(arena.take<Acc>(kPanels * L)),
          rows(arena.take<Acc>(kPanels * L * padded<Acc>(call.problem.head_dim))),
          grad_rows(
              arena.take<Acc>(call.has_vector(kValueTerm) ? kPanels * L * padded<Acc>(call.problem.value_dim) : 0)),
          walked(arena.take<int64_t>(kBlock)),
          value{walk.lane_term(arena, kValueTerm, 0, true, true), walk.lane_term(arena, kValueTerm, 1, true, true)},
          grad(arena, call.problem.head_dim) {}
  };

  static Work plan(const Call& call, int threads) {
    Arena counting{nullptr};
    Scratch s(counting, call, threads);
    return {s.walk.plan.items(), counting.used, s.walk.plan.items()};
  }

  static void run(const Call& call, int threads, int64_t item, Arena arena) {
    Scratch s(arena, call, threads);
    Walker& walk = s.walk;
    Acc* share = start_share<Acc>(call, item);
    walk.set_head(item % walk.plan.heads);
    for (int axis = 0; axis < 2; ++axis) {
      if (s.value[axis].on) {
        s.value[axis].table.template load<T>(call.vector[kValueTerm][axis], walk.head, false);
        s.value[axis].table.start_grad();
      }
      if (walk.lane[axis].on) walk.lane[axis].table.start_grad();
    }
    if (walk.bias.summing) walk.bias.start_grad();
    walk.tiles(item, [&](const typename Plan<M>::Pair&) { run_tile(call, s); });
    if (!share) return;
    const LaneTerm<M>* terms[] = {&walk.lane[0], &walk.lane[1], &s.value[0], &s.value[1]};
    for (const LaneTerm<M>* term : terms)
      if (term->on && call.wants_table(term->slot))
        term->table.add_grad(share + call.partial_offset[term->slot], false);
    if (walk.bias.summing) {
      walk.bias.flush();
      walk.bias.add_grad(share + call.partial_offset[0]);
    }
  }

  static void run_tile(const Call& call, Scratch& s) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    const Problem& p = call.problem;
    walk.start_tile();
    walk.start_head();
    walk.pack(call.grad_out, walk.head, p.value_dim, s.grads);
    walk.load_lanes(call.lse, s.lse);
    walk.load_lanes(call.delta, s.delta);
    for (int v = 0; v < tile.vectors; ++v)
      for (int l = tile.lane_of(v), end = l + W; l < end; ++l) s.lse[l] = weighting_lse(s.lse[l]);
    if (s.value[0].on || s.value[1].on) walk.load_lane_rows(call.grad_out, walk.head, p.value_dim, s.grad_rows);
    for (int axis = 0; axis < 2; ++axis) {
      if (s.value[axis].on) s.value[axis].read(tile, s.grad_rows), s.value[axis].start_sums(tile);
      if (walk.lane[axis].on) walk.lane[axis].start_sums(tile);
    }
    s.grad.start(tile.panels);

    walk.blocks([&] {
      walk.block.offsets(tile.walked_y, tile.walked_x, call.v, s.walked);
      const Staged<M> v =
          stage<M>(Rows<T>{at<T>(call.v, walk.b, walk.kv_head), s.walked, walk.block.n, p.value_dim, call.v.channel},
                   Use::kScores, s.values);
      const Rows<T> keys = walk.walked_rows(call.k, walk.kv_head, p.head_dim);
      const Staged<M> k = walk.guard(M::kPair == 1 ? walk.rows : stage<M>(keys, Use::kSums, s.key_sums), p.head_dim);
      for (int t = 0; t < tile.panels; ++t) {
        walk.score(t);
        walk.dot(t, v, s.grads + t * panel_elements<M>(p.value_dim), s.grad_weights, Acc(1));
        for (const auto& term : s.value)
          if (term.on) walk.add_lane(term, t, s.grad_weights);
        walk.vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
          const Vec<Acc> lse = load(s.lse + lane), delta = load(s.delta + lane);
          for (int64_t r = row; r < end; ++r)
            differentiate(walk.scores + r * L + at_lane, s.grad_weights + r * L + at_lane, lse, delta, true,
                          walk.guarded);
        });
        for (int axis = 0; axis < 2; ++axis) {
          if (s.value[axis].on) walk.sum_lane(s.value[axis], t, walk.scores);
          if (walk.lane[axis].on) walk.sum_lane(walk.lane[axis], t, s.grad_weights);
        }
        if (walk.bias.summing) walk.sum_bias(t, s.grad_weights);
        walk.add(s.grad, t, k, keys, s.grad_weights, s.weights);
      }
      s.grad.count_block(tile.panels);
      if (walk.bias.summing) walk.bias.flush_block(tile, walk.block);
    });
    finish(call, s);
  }

  static void finish(const Call& call, Scratch& s) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    for (auto& term : s.value)
      if (term.on && call.wants_table(term.slot)) term.spread(tile, s.grad_rows, nullptr, true);
    const bool has_rows =
        start_rows(walk, call, call.sum_q, call.grad_q, walk.head, walk.lane[0].on || walk.lane[1].on, s.rows);
    for (auto& term : walk.lane)
      if (term.on) term.spread(tile, walk.lane_rows, s.rows, call.wants_table(term.slot));
    if (call.grad_q.data)
      write(walk, call, call.sum_q, call.grad_q, walk.head, s.grad, Acc(call.problem.scale),
            has_rows ? s.rows : nullptr, call.problem.head_dim);
  }

  // Rows to be added to a tile's gradient: what earlier parts have summed, or zeros for terms to add to. False where
  // there is nothing to add.
  static bool start_rows(Walker& walk, const Call& call, const Map& sum, const Map& grad, int64_t head, bool terms,
                         Acc* rows) {
    const int64_t channels = call.problem.head_dim;
    const bool resume = call.part > 0 && grad.data;
    if (!terms && !resume) return false;
    if (resume) {
      read_rows(walk, Call::running(sum, grad), head, channels, rows);
    } else {
      for (int v = 0; v < walk.tile.vectors; ++v) {
        const int64_t ld = padded<Acc>(channels), start = walk.tile.lane_of(v) * ld;
        for (int64_t i = start; i < start + W * ld; i += W) store(rows + i, Vec<Acc>{});
      }
    }
    return true;
  }

  static void read_rows(Walker& walk, const Map& map, int64_t head, int64_t channels, Acc* rows) {
    walk.tile.offsets(map, walk.offset);
    for (int v = 0; v < walk.tile.vectors; ++v) {
      const int lane = walk.tile.lane_of(v);
      load_rows(at<Acc>(map, walk.b, head), walk.offset + lane, W, channels, map.channel,
                rows + lane * padded<Acc>(channels));
    }
  }

  // The tile's gradient, or the running sum if a part is still to come.
  static void write(Walker& walk, const Call& call, const Map& sum, const Map& grad, int64_t head, BlockSums<M>& sums,
                    Acc factor, const Acc* rows, int64_t channels) {
    const bool last = call.last_part();
    const Map& map = last ? grad : Call::running(sum, grad);
    const int64_t ld = padded<Acc>(channels);
    walk.tile.offsets(map, walk.offset);
    sums.finish(walk.tile.panels);
    for (int t = 0; t < walk.tile.panels; ++t) {
      const Acc* panel = sums.result(t);
      walk.vectors_of(t, [&](int at_lane, int lane) {
        const Acc* extra = rows ? rows + lane * ld : nullptr;
        if (last)
          unpack_vector(panel + at_lane, L, broadcast(factor), extra, ld, at_mutable<T>(map, walk.b, head),
                        walk.offset + lane, channels, map.channel);
        else
          unpack_vector(panel + at_lane, L, broadcast(factor), extra, ld, at_mutable<Acc>(map, walk.b, head),
                        walk.offset + lane, channels, map.channel);
      });
    }
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
