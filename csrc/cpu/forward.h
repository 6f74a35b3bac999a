// Forward: out and lse of a tile of queries (or, for the passes of weights.h, the softmax's two numbers alone), by an
// online softmax over blocks of keys.
//
//     S = scale * K Q^T + terms     one product per block and panel     [keys, lanes]
//     m, l, O rescaled where the maximum grew; P = e^(S - m)
//     l += sum P;  O += V^T P       the other product                   [channels, lanes]
//
// RelativeValue: P is summed by offset too, U, rescaled like O; out += U rel at the end. The second part of a pattern
// goes on from the state of the first: O = out, m = lse, l = 1.
//
// Per panel and block of 64 keys: 2 * 64 * (D + Dv) * kTile operations, 64 * kTile exponentials; nothing leaves the
// first-level caches but the staged block.
#pragma once

#include "scores.h"

namespace visattn::cpu::VISATTN_ISA {

// The softmax state of a tile's lanes.
template <class M>
struct OnlineSoftmax {
  using Acc = typename M::Acc;
  using V = Vec<Acc>;
  static constexpr int W = kLanes<Acc>, L = kTile<M>;
  static constexpr Acc kMinusInf = -Acc(__builtin_inf());

  Acc *maximum, *sum;
  Acc* lost;  // what rounding took from `sum` (Kahan), which has one more addend per block

  void start() {
    for (int i = 0; i < kPanels * L; ++i) maximum[i] = kMinusInf, sum[i] = lost[i] = 0;
  }

  // Replace a vector's scores of n keys by weights relative to the new maximum; rescale what was summed before.
  template <class Rescale>
  VISATTN_INLINE void update(int lane, Acc* scores, int64_t n, Rescale rescale) {
    const V old = load(maximum + lane);
    V a = old, b = broadcast(kMinusInf);  // two chains hide the latency
    int64_t r = 0;
    for (; r + 1 < n; r += 2) {
      a = max(a, load(scores + r * L));
      b = max(b, load(scores + (r + 1) * L));
    }
    if (r < n) a = max(a, load(scores + r * L));
    const V top = max(a, b);
    store(maximum + lane, top);
    const V finite = zero_if_infinite(top);  // -inf - -inf would be NaN
    V l = load(sum + lane), e = load(lost + lane);
    if (any_differs(top, old) && any_differs(old, broadcast(kMinusInf))) {
      const V factor = old == top ? broadcast(Acc(1)) : exp(old - finite);  // an infinite maximum stays what it is
      l *= factor;
      e *= factor;
      rescale(factor);
    }
    V block0{}, block1{};
    for (r = 0; r + 1 < n; r += 2) {
      const V p0 = exp(load(scores + r * L) - finite);
      const V p1 = exp(load(scores + (r + 1) * L) - finite);
      block0 += p0;
      block1 += p1;
      store(scores + r * L, p0);
      store(scores + (r + 1) * L, p1);
    }
    if (r < n) {
      const V p = exp(load(scores + r * L) - finite);
      block0 += p;
      store(scores + r * L, p);
    }
    const V addend = (block0 + block1) - e, next = l + addend;
    store(lost + lane, next == -kMinusInf ? V{} : (next - l) - addend);  // inf - inf would be NaN
    store(sum + lane, next);
  }
};

template <class T>
struct Forward {
  using Walker = Walk<T>;
  using M = typename Walker::M;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;
  static constexpr Acc kMinusInf = OnlineSoftmax<M>::kMinusInf;

  // One item's scratch memory.
  struct Scratch {
    Walker walk;
    Elem *values, *weights;
    OnlineSoftmax<M> softmax;
    Acc *inverse, *rows;
    int64_t* walked;
    LaneTerm<M> term[2];  // RelativeValue
    BlockSums<M> out;

    Scratch(Arena& arena, const Call& call, Pass pass, int threads)
        : walk(arena, call, true, threads, false, false, false),
          values(arena.take<Elem>(staged_elements<M>(call.problem.value_dim))),
          weights(arena.take<Elem>(kBlock / 2 * L)),
          softmax{arena.take<Acc>(kPanels * L), arena.take<Acc>(kPanels * L), arena.take<Acc>(kPanels * L)},
          inverse(arena.take<Acc>(kPanels * L)),
          rows(arena.take<Acc>(has_term(call, pass) ? kPanels * L * padded<Acc>(call.problem.value_dim) : 0)),
          walked(arena.take<int64_t>(kBlock)),
          term{value_term(arena, call, pass, 0), value_term(arena, call, pass, 1)},
          out(arena, out_rows(call, pass)) {}

    LaneTerm<M> value_term(Arena& arena, const Call& call, Pass pass, int axis) const {
      const Problem& p = call.problem;
      return {arena,
              has_term(call, pass) && call.vector[kValueTerm][axis].data,
              false,
              true,
              axis,
              table_slot(kValueTerm, axis),
              p.reach(axis),
              p.value_dim,
              walk.plan.walked_extent(axis),
              walk.plan.resident_extent(axis)};
    }
  };

  static bool has_term(const Call& call, Pass pass) { return pass == Pass::kForward && call.has_vector(kValueTerm); }
  static int64_t out_rows(const Call& call, Pass pass) { return pass == Pass::kForward ? call.problem.value_dim : 0; }

  static Work plan(const Call& call, Pass pass, int threads) {
    Arena counting{nullptr};
    Scratch s(counting, call, pass, threads);
    return {s.walk.plan.items(), counting.used, 0};
  }

  static void run(const Call& call, Pass pass, int threads, int64_t item, Arena arena) {
    Scratch s(arena, call, pass, threads);
    Walker& walk = s.walk;
    walk.set_head(item % walk.plan.heads);
    for (auto& term : s.term)
      if (term.on) term.table.template load<T>(call.vector[kValueTerm][term.axis], walk.head, false);
    walk.tiles(item, [&](const typename Plan<M>::Pair&) { run_tile(call, pass, s); });
  }

  static void run_tile(const Call& call, Pass pass, Scratch& s) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    const int64_t value_dim = call.problem.value_dim;
    const bool with_values = pass == Pass::kForward;
    walk.start_tile();
    walk.start_head();
    start(call, pass, s);
    walk.blocks([&] {
      Staged<M> v{};
      Rows<T> source{};
      if (with_values) {
        walk.block.offsets(tile.walked_y, tile.walked_x, call.v, s.walked);
        source = {at<T>(call.v, walk.b, walk.kv_head), s.walked, walk.block.n, value_dim, call.v.channel};
        v = walk.guard(stage<M>(source, Use::kSums, s.values), value_dim);
      }
      for (int t = 0; t < tile.panels; ++t) {
        walk.score(t);
        walk.vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
          s.softmax.update(lane, walk.scores + row * L + at_lane, end - row, [&](Vec<Acc> by) {
            if (!with_values) return;
            s.out.each(t, [&](Acc* panel) { rescale(panel + at_lane, L, value_dim, by); });
            for (auto& term : s.term)
              if (term.on) rescale(term.sums + lane, kPanels * L, term.extent(tile), by);
          });
        });
        if (!with_values) continue;
        for (auto& term : s.term)
          if (term.on) walk.sum_lane(term, t, walk.scores);
        walk.add(s.out, t, v, source, walk.scores, s.weights);
      }
      if (with_values) s.out.count_block(tile.panels);
    });
    if (with_values)
      finish(call, s);
    else
      finish_statistics(call, s);
  }

  static VISATTN_INLINE void rescale(Acc* sums, int64_t ld, int64_t rows, Vec<Acc> factor) {
    for (int64_t i = 0; i < rows; ++i) store(sums + i * ld, load(sums + i * ld) * factor);
  }

  // The empty state, or the one that the part before has left.
  static void start(const Call& call, Pass pass, Scratch& s) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    s.softmax.start();
    for (auto& term : s.term)
      if (term.on) term.start_sums(tile);
    if (pass == Pass::kForward) s.out.start(tile.panels);
    if (call.part == 0) return;
    if (pass == Pass::kForward) {
      const Map& sum = Call::running(call.sum_out, call.out);
      tile.offsets(sum, walk.offset);
      for (int t = 0; t < tile.panels; ++t)
        walk.vectors_of(t, [&](int at_lane, int lane) {
          pack_vector<Plain<Acc>>(at<Acc>(sum, walk.b, walk.head), walk.offset + lane, call.problem.value_dim,
                                  sum.channel, s.out.part(t) + at_lane);
        });
      tile.offsets(call.lse, walk.offset);
      each_active(tile, [&](int l) {
        const Acc lse = at<Acc>(call.lse, walk.b, walk.head)[walk.offset[l]];
        s.softmax.maximum[l] = lse;
        s.softmax.sum[l] = lse == kMinusInf ? 0 : 1;
      });
    } else {
      tile.result_offsets(call.maximum, walk.offset);
      each_active(tile,
                  [&](int l) { s.softmax.maximum[l] = at<Acc>(call.maximum, walk.b, walk.head)[walk.offset[l]]; });
      tile.result_offsets(call.inverse, walk.offset);
      each_active(tile, [&](int l) {
        const Acc inverse = at<Acc>(call.inverse, walk.b, walk.head)[walk.offset[l]];
        s.softmax.sum[l] = s.softmax.maximum[l] == -kMinusInf ? -kMinusInf : inverse == 0 ? Acc(0) : 1 / inverse;
      });
    }
  }

  template <class F>
  static VISATTN_INLINE void each_active(const Tile<M>& tile, F f) {
    for (int v = 0; v < tile.vectors; ++v)
      for (int l = tile.lane_of(v), end = l + W; l < end; ++l)
        if (tile.active[l]) f(l);
  }

  static void finish(const Call& call, Scratch& s) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    const int64_t value_dim = call.problem.value_dim, ld = padded<Acc>(value_dim);
    const Acc* rows = nullptr;
    for (int v = 0; v < tile.vectors; ++v)
      for (int l = tile.lane_of(v), end = l + W; l < end; ++l)
        s.inverse[l] = s.softmax.sum[l] == 0 ? Acc(0) : 1 / s.softmax.sum[l];
    if (s.term[0].on || s.term[1].on) {
      for (int v = 0; v < tile.vectors; ++v)
        for (int64_t i = tile.lane_of(v) * ld, end = i + W * ld; i < end; i += W) store(s.rows + i, Vec<Acc>{});
      for (auto& term : s.term)
        if (term.on) term.spread(tile, nullptr, s.rows, false);
      each_active(tile, [&](int l) {
        for (int64_t c = 0; c < ld; ++c) s.rows[l * ld + c] *= s.inverse[l];
      });
      rows = s.rows;
    }
    const bool last = call.last_part();
    const Map& map = last ? call.out : Call::running(call.sum_out, call.out);
    tile.offsets(map, walk.offset);
    s.out.finish(tile.panels);
    for (int t = 0; t < tile.panels; ++t) {
      const Acc* sums = s.out.result(t);
      walk.vectors_of(t, [&](int at_lane, int lane) {
        const Vec<Acc> factor = load(s.inverse + lane);
        const Acc* extra = rows ? rows + lane * ld : nullptr;
        if (last)
          unpack_vector(sums + at_lane, L, factor, extra, ld, at_mutable<T>(map, walk.b, walk.head), walk.offset + lane,
                        value_dim, map.channel);
        else
          unpack_vector(sums + at_lane, L, factor, extra, ld, at_mutable<Acc>(map, walk.b, walk.head),
                        walk.offset + lane, value_dim, map.channel);
      });
    }
    tile.offsets(call.lse, walk.offset);
    Acc* lse = at_mutable<Acc>(call.lse, walk.b, walk.head);
    each_active(tile, [&](int l) {
      const Acc m = s.softmax.maximum[l], sum = s.softmax.sum[l];
      lse[walk.offset[l]] = sum == 0 ? kMinusInf : m + natural_log(sum);
    });
  }

  static void finish_statistics(const Call& call, Scratch& s) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    tile.result_offsets(call.maximum, walk.offset);
    each_active(tile, [&](int l) {
      const Acc m = s.softmax.maximum[l];  // weights are relative to 0 where it is infinite
      at_mutable<Acc>(call.maximum, walk.b, walk.head)[walk.offset[l]] = m - m == 0 || !call.last_part() ? m : Acc(0);
    });
    tile.result_offsets(call.inverse, walk.offset);
    each_active(tile, [&](int l) {
      at_mutable<Acc>(call.inverse, walk.b, walk.head)[walk.offset[l]] =
          s.softmax.sum[l] == 0 ? Acc(0) : 1 / s.softmax.sum[l];
    });
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
