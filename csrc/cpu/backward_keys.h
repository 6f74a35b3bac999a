// Backward with keys resident: dK, dV, the terms of a key's offsets, and where it can dQ. See backward.h.
#pragma once

#include "backward.h"

namespace visattn::cpu::VISATTN_ISA {

// Wait for a tile's turn: a moment if threads keep pace, so spin first.
VISATTN_INLINE void await_turn(const int32_t* turn, int32_t mine) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins) {
    if (spins > 2000) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

template <class T>
struct GradKeys {
  using Walker = Walk<T>;
  using M = typename Walker::M;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  struct Scratch {
    Walker walk;
    Elem *values, *key_rows, *query_sums, *grad_scores, *grad_sums, *weights;
    Acc *grad_weights, *grad_queries, *lse, *delta, *rows, *value_rows, *key_bias;
    int64_t *walked, *grad_walked;
    WalkTerm<M> value[2];
    BlockSums<M> grad_k, grad_v;
    bool infinite;  // whether a resident key holds a NaN or an infinity

    Scratch(Arena& arena, const Call& call, Pass pass, int threads)
        : Scratch(arena, call, call.problem, pass == Pass::kGradTogether, threads) {}

    Scratch(Arena& arena, const Call& call, const Problem& p, bool together, int threads)
        : walk(arena, call, false, threads, call.partial_size > 0, true, together),
          values(arena.take<Elem>(kPanels * panel_elements<M>(p.value_dim))),
          key_rows(arena.take<Elem>(together ? kPanels * row_panel_elements<M>(p.head_dim) : 0)),
          query_sums(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          grad_scores(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          grad_sums(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          weights(arena.take<Elem>(kBlock / 2 * L)),
          grad_weights(arena.take<Acc>(kBlock * L)),
          grad_queries(arena.take<Acc>(together ? (kPanels + 1) * queries_panel(p) : 0)),
          lse(arena.take<Acc>(kBlock)),
          delta(arena.take<Acc>(kBlock)),
          rows(arena.take<Acc>(kPanels * L * padded<Acc>(max(p.head_dim, p.value_dim)))),
          value_rows(arena.take<Acc>(call.has_vector(kValueTerm) ? kBlock * padded<Acc>(p.value_dim) : 0)),
          key_bias(arena.take<Acc>(kPanels * L)),
          walked(arena.take<int64_t>(kBlock)),
          grad_walked(arena.take<int64_t>(kBlock)),
          value{walk.walk_term(arena, kValueTerm, 0, together), walk.walk_term(arena, kValueTerm, 1, together)},
          grad_k(arena, p.head_dim),
          grad_v(arena, p.value_dim),
          infinite(false) {}
  };

  static Work plan(const Call& call, Pass pass, int threads) {
    Arena counting{nullptr};
    Scratch s(counting, call, pass, threads);
    return {s.walk.plan.items(), counting.used, s.walk.plan.items() * call.problem.group()};
  }

  static void run(const Call& call, Pass pass, int threads, int64_t item, Arena arena) {
    Scratch s(arena, call, pass, threads);
    Walker& walk = s.walk;
    const int64_t group = call.problem.group(), kv_head = item % walk.plan.heads;
    for (int64_t g = 0; g < group; ++g) start_share<Acc>(call, item * group + g);
    walk.tiles(item, [&](const typename Plan<M>::Pair& pair) {
      run_tile(call, pass == Pass::kGradTogether && call.grad_q.data, s, kv_head, item, pair);
    });
    if (walk.head >= 0) finish_head(call, s, item);
  }

  static void start_head(const Call& call, Scratch& s, int64_t head, int64_t item) {
    Walker& walk = s.walk;
    if (walk.loaded != head) {
      if (walk.loaded >= 0) finish_head(call, s, item);
      walk.set_head(head);
      for (int axis = 0; axis < 2; ++axis) {
        if (s.value[axis].on) s.value[axis].table.template load<T>(call.vector[kValueTerm][axis], head, false);
        if (walk.lane[axis].on) walk.lane[axis].table.start_grad();
        if (wants(call, walk.walk[axis])) walk.walk[axis].table.start_grad();
        if (wants(call, s.value[axis])) s.value[axis].table.start_grad();
      }
      if (walk.bias.summing) walk.bias.start_grad();
    }
    walk.start_head();
    for (auto& term : walk.lane)
      if (term.on) term.start_sums(walk.tile);
    for (int v = 0; v < walk.tile.vectors; ++v) store(s.key_bias + walk.tile.lane_of(v), Vec<Acc>{});
  }

  // Add the tables' gradients of the head in hand to its share.
  static void finish_head(const Call& call, Scratch& s, int64_t item) {
    Walker& walk = s.walk;
    const int64_t group = call.problem.group();
    Acc* share = (Acc*)call.partials + (item * group + walk.loaded % group) * call.partial_size;
    if (!call.partials) return;
    for (int axis = 0; axis < 2; ++axis) {
      const auto add = [&](const auto& term, bool flip) {
        if (wants(call, term)) term.table.add_grad(share + call.partial_offset[term.slot], flip);
      };
      add(walk.lane[axis], true), add(walk.walk[axis], false), add(s.value[axis], false);
    }
    if (walk.bias.summing) {
      walk.bias.flush();
      walk.bias.add_grad(share + call.partial_offset[0]);
    }
  }

  static void run_tile(const Call& call, bool want_q, Scratch& s, int64_t kv_head, int64_t item,
                       const typename Plan<M>::Pair& pair) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    const Problem& p = call.problem;
    const bool want_k = call.grad_k.data, want_v = call.grad_v.data;
    const bool want_tables = wants(call, walk.lane[0]) || wants(call, walk.lane[1]) || wants(call, walk.walk[0]) ||
                             wants(call, walk.walk[1]) || walk.bias.summing;
    const bool want_scores = want_q || want_k || want_tables || call.grad_key_bias.data;
    walk.kv_head = kv_head;
    walk.start_tile();
    walk.pack(call.v, kv_head, p.value_dim, s.values);
    if (want_q) pack_key_rows(call, s);
    s.grad_k.start(tile.panels), s.grad_v.start(tile.panels);
    const bool has_rows = GradQueries<T>::start_rows(walk, call, call.sum_k, call.grad_k, kv_head,
                                                     walk.lane[0].on || walk.lane[1].on, s.rows);

    for (int64_t head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head) {
      start_head(call, s, head, item);
      walk.blocks([&] {
        const Rows<T> queries = walk.walked_rows(call.q, head, p.head_dim);
        Staged<M> q = walk.rows, g_sums{};
        if (want_k) q = walk.guard(M::kPair == 1 ? walk.rows : stage<M>(queries, Use::kSums, s.query_sums), p.head_dim);
        walk.block.offsets(tile.walked_y, tile.walked_x, call.grad_out, s.grad_walked);
        const Rows<T> grads{at<T>(call.grad_out, walk.b, head), s.grad_walked, walk.block.n, p.value_dim,
                            call.grad_out.channel};
        const Staged<M> g = stage<M>(grads, Use::kScores, s.grad_scores);
        if (want_v) g_sums = walk.guard(M::kPair == 1 ? g : stage<M>(grads, Use::kSums, s.grad_sums), p.value_dim);
        if (s.value[0].on || s.value[1].on) {
          load_rows(grads.data, grads.offset, grads.n, grads.channels, grads.stride, s.value_rows);
          for (auto& term : s.value)
            if (term.on) term.read(tile, walk.block, s.value_rows);
        }
        for (int axis = 0; axis < 2; ++axis) {
          if (walk.walk[axis].on && (want_q || wants(call, walk.walk[axis]))) walk.walk[axis].start_sums(walk.block);
          if (wants(call, s.value[axis])) s.value[axis].start_sums(walk.block);
        }
        load_block(walk, call.lse, s.walked, s.lse);
        for (int64_t r = 0; r < walk.block.n; ++r) s.lse[r] = weighting_lse(s.lse[r]);
        if (want_scores) load_block(walk, call.delta, s.walked, s.delta);

        for (int t = 0; t < tile.panels; ++t) {
          walk.score(t);
          if (want_scores) grad_scores(call, s, t, g);
          walk.vectors(t, [&](int at_lane, int, int, int64_t row, int64_t end) {
            for (int64_t r = row; r < end; ++r)
              differentiate(walk.scores + r * L + at_lane, s.grad_weights + r * L + at_lane, broadcast(s.lse[r]),
                            broadcast(want_scores ? s.delta[r] : Acc(0)), want_scores, walk.guarded);
          });
          if (want_v) walk.add(s.grad_v, t, g_sums, grads, walk.scores, s.weights);
          if (want_k) walk.add(s.grad_k, t, q, queries, s.grad_weights, s.weights);
          sum_terms(call, s, t, want_q, want_scores);
          if (want_q) sum_grad_queries(call, s, t);
        }
        spread_walks(call, s, want_q);
        s.grad_k.count_block(tile.panels), s.grad_v.count_block(tile.panels);
        if (walk.bias.summing) walk.bias.flush_block(tile, walk.block);
        if (want_q) add_in_turn(call, s, pair);
      });
      finish_tile_head(call, s, want_scores);
    }

    if (want_k)
      GradQueries<T>::write(walk, call, call.sum_k, call.grad_k, kv_head, s.grad_k, Acc(p.scale),
                            has_rows ? s.rows : nullptr, p.head_dim);
    if (want_v) {
      const bool resume = call.part > 0;
      if (resume) GradQueries<T>::read_rows(walk, Call::running(call.sum_v, call.grad_v), kv_head, p.value_dim, s.rows);
      GradQueries<T>::write(walk, call, call.sum_v, call.grad_v, kv_head, s.grad_v, Acc(1), resume ? s.rows : nullptr,
                            p.value_dim);
    }
  }

  static void pack_key_rows(const Call& call, Scratch& s) {
    Walker& walk = s.walk;
    const int64_t channels = call.problem.head_dim;
    walk.tile.offsets(call.k, walk.offset);
    s.infinite = false;
    for (int t = 0; t < walk.tile.panels; ++t) {
      Elem* to = s.key_rows + t * row_panel_elements<M>(channels);
      pack_row_panel<M>(Rows<T>{at<T>(call.k, walk.b, walk.kv_head), walk.offset + t * L,
                                walk.tile.panel_vectors(t) * W, channels, call.k.channel},
                        to);
      for (int64_t c = 0; walk.guarded && c * L < channels; ++c)
        s.infinite |=
            any_not_finite<M>(to + c * (L / M::kPair) * L, ceil_div(walk.tile.panel_vectors(t) * W, M::kPair) * L);
    }
  }

  // grad_weights = dP of panel t.
  static void grad_scores(const Call& call, Scratch& s, int t, const Staged<M>& g) {
    Walker& walk = s.walk;
    walk.dot(t, g, s.values + t * panel_elements<M>(call.problem.value_dim), s.grad_weights, Acc(1));
    for (const auto& term : s.value)
      if (term.on)
        walk.vectors(t, [&](int at_lane, int lane, int v, int64_t row, int64_t end) {
          term.add(walk.tile, walk.block, v, lane, row, end, s.grad_weights + at_lane);
        });
  }

  // Whether the gradient of a term's table is asked of this pass.
  template <class Term>
  static bool wants(const Call& call, const Term& term) {
    return term.on && call.wants_table(term.slot);
  }

  static void sum_terms(const Call& call, Scratch& s, int t, bool want_q, bool want_scores) {
    Walker& walk = s.walk;
    for (int axis = 0; axis < 2; ++axis) {
      if (walk.lane[axis].on && want_scores) walk.sum_lane(walk.lane[axis], t, s.grad_weights);
      if (walk.walk[axis].on && (want_q || wants(call, walk.walk[axis])))
        walk.sum_walk(walk.walk[axis], t, s.grad_weights);
      if (wants(call, s.value[axis])) walk.sum_walk(s.value[axis], t, walk.scores);
    }
    if (walk.bias.summing) walk.sum_bias(t, s.grad_weights);
    if (!call.grad_key_bias.data) return;
    walk.vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
      Vec<Acc> sum{};
      for (int64_t r = row; r < end; ++r) sum += load(s.grad_weights + r * L + at_lane);
      store(s.key_bias + lane, load(s.key_bias + lane) + sum);
    });
  }

  // What a block's sums by offset give: a share of dQ, beside those of the panels, and gradients of tables.
  static void spread_walks(const Call& call, Scratch& s, bool want_q) {
    Walker& walk = s.walk;
    Acc* share = want_q ? s.grad_queries + kPanels * queries_panel(call.problem) : nullptr;
    if (share && (walk.walk[0].on || walk.walk[1].on))
      for (int64_t i = 0; i < queries_panel(call.problem); i += W) store(share + i, Vec<Acc>{});
    for (int axis = 0; axis < 2; ++axis) {
      auto &of_query = walk.walk[axis], &of_value = s.value[axis];
      if (of_query.on && (want_q || wants(call, of_query)))
        of_query.spread(walk.block, walk.walk_rows, share, wants(call, of_query));
      if (wants(call, of_value)) of_value.spread(walk.block, s.value_rows, nullptr, true);
    }
  }

  static void finish_tile_head(const Call& call, Scratch& s, bool want_scores) {
    Walker& walk = s.walk;
    for (auto& term : walk.lane)
      if (term.on && want_scores) term.spread(walk.tile, walk.lane_rows, s.rows, call.wants_table(term.slot));
    if (!call.grad_key_bias.data) return;
    walk.tile.offsets(call.grad_key_bias, walk.offset);
    Acc* grad = at_mutable<Acc>(call.grad_key_bias, walk.b, walk.head);
    for (int v = 0; v < walk.tile.vectors; ++v)
      for (int l = walk.tile.lane_of(v), end = l + W; l < end; ++l)
        if (walk.tile.active[l]) grad[walk.offset[l]] = s.key_bias[l] + (call.part > 0 ? grad[walk.offset[l]] : Acc(0));
  }

  static void load_block(Walker& walk, const Map& map, int64_t* offset, Acc* to) {
    walk.block.offsets(walk.tile.walked_y, walk.tile.walked_x, map, offset);
    const Acc* from = at<Acc>(map, walk.b, walk.head);
    for (int64_t r = 0; r < walk.block.n; ++r) to[r] = from[offset[r]];
  }

  // Active lanes of panel t, where all pairs of a region are walked.
  static int64_t panel_lanes(const Tile<M>& tile, int t) {
    return min(tile.panel_vectors(t) * W, tile.count - tile.panel_first[t] * W);
  }

  // A panel's share in dQ of a block: [channel / L][query][channel % L].
  static int64_t queries_panel(const Problem& p) { return ceil_div(p.head_dim, L) * kBlock * L; }

  static void sum_grad_queries(const Call& call, Scratch& s, int t) {
    Walker& walk = s.walk;
    const int64_t channels = call.problem.head_dim, n = walk.block.n, lanes = panel_lanes(walk.tile, t);
    if (s.infinite) return sum_weighted(call, s, t, lanes);
    const Elem* grads = pack_weight_rows<M>(s.grad_weights, n, lanes, s.weights);
    const Strides strides{L / M::kPair, 1};
    const Elem* rows = s.key_rows + t * row_panel_elements<M>(channels);
    for (int64_t c = 0; c * L < channels; ++c) {
      const int vectors = int(ceil_div(min(int64_t(L), channels - c * L), W));
      const Elem* right = rows + c * (L / M::kPair) * L;
      Acc* sum = s.grad_queries + t * queries_panel(call.problem) + c * kBlock * L;
      product<M, false>(vectors, grads, strides, n, ceil_div(lanes, M::kPair), right, sum, Acc(1));
    }
  }

  // The same where some keys hold NaN or infinity: a pair of gradient zero adds nothing.
  static void sum_weighted(const Call& call, Scratch& s, int t, int64_t lanes) {
    Walker& walk = s.walk;
    const int64_t channels = call.problem.head_dim;
    walk.tile.offsets(call.k, walk.offset);
    for (int64_t r = 0; r < walk.block.n; ++r)
      for (int64_t d = 0; d < channels; ++d) {
        Acc sum = 0;
        for (int64_t l = 0; l < lanes; ++l) {
          const Acc weight = s.grad_weights[r * L + l];
          if (weight == 0) continue;
          const T* key = at<T>(call.k, walk.b, walk.kv_head) + walk.offset[t * L + l];
          sum += weight * Acc(widen(key[d * call.k.channel]));
        }
        s.grad_queries[t * queries_panel(call.problem) + (d / L * kBlock + r) * L + d % L] = sum;
      }
  }

  // Add a block's dQ to the running sum when it is the tile's turn; the last tile writes the gradient.
  static void add_in_turn(const Call& call, Scratch& s, const typename Plan<M>::Pair& pair) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    const Problem& p = call.problem;
    const int64_t region_keys = tile.resident_y.count * tile.resident_x.count;
    const bool start = call.part == 0 && pair.tile == 0;
    const bool last = call.last_part() && (pair.tile + 1) * walk.plan.capacity >= region_keys;
    const int64_t per_head = turns(call);
    int32_t* turn = call.turns + (walk.b * p.heads + walk.head) * per_head +
                    pair.region * (per_head / walk.plan.regions) + walk.block.first / walk.step;
    await_turn(turn, int32_t(pair.tile));
    const Map& map = Call::running(call.sum_q, call.grad_q);
    walk.block.offsets(tile.walked_y, tile.walked_x, map, s.walked);
    walk.block.offsets(tile.walked_y, tile.walked_x, call.grad_q, s.grad_walked);
    Acc* running = at_mutable<Acc>(map, walk.b, walk.head);
    T* grad = at_mutable<T>(call.grad_q, walk.b, walk.head);
    const Acc scale = Acc(p.scale);
    const int64_t panel = queries_panel(p);
    const bool terms = walk.walk[0].on || walk.walk[1].on;
    for (int64_t r = 0; r < walk.block.n; ++r)
      for (int64_t d = 0; d < p.head_dim; d += W) {
        const int64_t n = p.head_dim - d;
        const Acc* share = s.grad_queries + (d / L * kBlock + r) * L + d % L;
        Vec<Acc> sum = start ? Vec<Acc>{} : load_some<Acc>(running + s.walked[r] + d, n);
        for (int t = 0; t < tile.panels; ++t) sum += load(share + t * panel) * scale;
        if (terms) sum += load(share + kPanels * panel);
        if (last)
          store_some(grad + s.grad_walked[r] + d, sum, n);
        else
          store_some(running + s.walked[r] + d, sum, n);
      }
    __atomic_store_n(turn, int32_t(pair.tile + 1), __ATOMIC_RELEASE);
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
