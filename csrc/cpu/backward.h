// Backward: weights are computed again from lse, with keys resident and queries walked.
//
//     P = 2^(S - lse)      dP = dO V^T      dS = P * (dP - delta)      delta_i = out_i · dO_i - dlse_i
//
//     dV[j] = sum_i P dO_i      dK[j] = scale * sum_i dS q_i      dQ[i] = scale * sum_j dS k_j       5 products
//
// dV and dK are sums over the walk and stay with the tile. dQ is a sum over tiles: each adds the share of its panels in
// a block of queries to a running sum in memory, panel after panel, in the order of the tiles. A counter per block says
// whose turn it is, so that no two threads add at once and the order of additions, hence every bit, is the same however
// keys are cut into tiles. Tiles are handed out in their order, so a tile waits only for tiles that are being worked
// on, and there is no deadlock.
#pragma once

#include <sched.h>

#include "tile.h"

namespace visattn::cpu::VISATTN_ISA {

// delta of one row of one map. Summed in double: dP - delta cancels, and this is a small share of the work.
template <class T>
void run_delta(const Call& call, int64_t item) {
  using Acc = typename Arithmetic<T>::Type::Acc;
  const Problem& p = call.problem;
  const int64_t b = item / p.queries.h, y = item % p.queries.h;
  for (int64_t x = 0; x < p.queries.w; ++x)
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* out = at<T>(call.out, b, h) + y * call.out.y + x * call.out.x;
      const T* grad = at<T>(call.grad_out, b, h) + y * call.grad_out.y + x * call.grad_out.x;
      double sum = 0;
      for (int64_t c = 0; c < p.value_dim; ++c)
        sum += double(widen(out[c * call.out.channel])) * double(widen(grad[c * call.grad_out.channel]));
      at_mutable<Acc>(call.delta, b, h)[y * call.delta.y + x * call.delta.x] =
          Acc(sum) - at<Acc>(call.grad_lse, b, h)[y * call.grad_lse.y + x * call.grad_lse.x];
    }
}

// A query's lse in base 2; infinity for a query with no key, so that its weights are 0.
template <class Acc>
VISATTN_INLINE Acc lse2(Acc lse) {
  return lse == -Acc(__builtin_inf()) ? Acc(__builtin_inf()) : lse * Acc(kLog2E);
}

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
struct Backward {
  using M = typename Arithmetic<T>::Type;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  struct Scratch {
    Elem *keys, *values, *key_rows, *query_scores, *query_sums, *grad_scores, *grad_sums, *weights;
    Acc *scores, *grad_weights, *grad_queries, *factor, *lse, *delta;
    int64_t *offset, *walked;
    BlockSum<M> grad_k[kPanels], grad_v[kPanels];

    Scratch(Arena& arena, const Problem& p)
        : keys(arena.take<Elem>(kPanels * panel_elements<M>(p.head_dim))),
          values(arena.take<Elem>(kPanels * panel_elements<M>(p.value_dim))),
          key_rows(arena.take<Elem>(kPanels * row_panel_elements<M>(p.head_dim))),
          query_scores(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          query_sums(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          grad_scores(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          grad_sums(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          weights(arena.take<Elem>(kBlock / 2 * L)),
          scores(arena.take<Acc>(kBlock * L)),
          grad_weights(arena.take<Acc>(kBlock * L)),
          grad_queries(arena.take<Acc>(kPanels * ceil_div(p.head_dim, L) * kBlock * L)),
          factor(arena.take<Acc>(L)),
          lse(arena.take<Acc>(kBlock)),
          delta(arena.take<Acc>(kBlock)),
          offset(arena.take<int64_t>(kPanels * L)),
          walked(arena.take<int64_t>(kBlock)),
          grad_k{{arena, p.head_dim}, {arena, p.head_dim}, {arena, p.head_dim}, {arena, p.head_dim}},
          grad_v{{arena, p.value_dim}, {arena, p.value_dim}, {arena, p.value_dim}, {arena, p.value_dim}} {}
  };

  static Tiling<M> tiling(const Call& call, int threads) {
    return {call.problem.keys.size(), call.problem.batch * call.problem.kv_heads, threads};
  }

  static int64_t items(const Call& call, int threads) {
    return tiling(call, threads).tiles * call.problem.batch * call.problem.kv_heads;
  }

  static void run(const Call& call, int threads, int64_t item, Arena arena) {
    const Problem& p = call.problem;
    Scratch s(arena, p);
    const Tiling<M> tiles = tiling(call, threads);
    const int64_t maps = p.batch * p.kv_heads, index = item / maps;  // neighbours in time are of different maps
    const Tile tile = tiles[index];
    const int64_t kv_head = item % maps % p.kv_heads, b = item % maps / p.kv_heads;
    const int panels = int(ceil_div(tile.count, L));
    const Acc factor = Acc(p.scale * kLog2E);
    const Box keys = whole(p.keys), queries = attended_box(p.pattern, p.queries);
    const bool want_q = call.grad_q.data, want_k = call.grad_k.data, want_v = call.grad_v.data;

    offsets(call.k, keys, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t) {
      const Rows<T> rows{at<T>(call.k, b, kv_head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.head_dim,
                         call.k.channel};
      pack_panel<M>(rows, s.keys + t * panel_elements<M>(p.head_dim));
      if (want_q) pack_row_panel<M>(rows, s.key_rows + t * row_panel_elements<M>(p.head_dim));
    }
    offsets(call.v, keys, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t)
      pack_panel<M>(Rows<T>{at<T>(call.v, b, kv_head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.value_dim,
                            call.v.channel},
                    s.values + t * panel_elements<M>(p.value_dim));

    int64_t block = 0;
    for (int64_t head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head)
      for (int64_t first = 0; first < queries.size(); first += kBlock, ++block) {
        const int64_t n = min(kBlock, queries.size() - first);
        offsets(call.q, queries, first, n, s.walked);
        const Rows<T> query_rows{at<T>(call.q, b, head), s.walked, n, p.head_dim, call.q.channel};
        const Staged<M> q = stage<M>(query_rows, Use::kScores, s.query_scores);
        const Staged<M> q_sums = M::kPair == 1 || !want_k ? q : stage<M>(query_rows, Use::kSums, s.query_sums);
        offsets(call.grad_out, queries, first, n, s.walked);
        const Rows<T> grad_rows{at<T>(call.grad_out, b, head), s.walked, n, p.value_dim, call.grad_out.channel};
        const Staged<M> g = stage<M>(grad_rows, Use::kScores, s.grad_scores);
        const Staged<M> g_sums = M::kPair == 1 || !want_v ? g : stage<M>(grad_rows, Use::kSums, s.grad_sums);
        load_block(call.lse, queries, b, head, first, n, s.walked, s.lse);
        for (int64_t r = 0; r < n; ++r) s.lse[r] = lse2(s.lse[r]);
        if (want_q || want_k) load_block(call.delta, queries, b, head, first, n, s.walked, s.delta);

        for (int t = 0; t < panels; ++t) {
          const int64_t lanes = panel_lanes<M>(tile.count, t);
          const int vectors = panel_vectors<M>(lanes);
          product<M, false>(vectors, q.data, q.scores, n, q.scores_k, s.keys + t * panel_elements<M>(p.head_dim),
                            s.scores, factor);
          if (want_q || want_k)
            product<M, false>(vectors, g.data, g.scores, n, g.scores_k, s.values + t * panel_elements<M>(p.value_dim),
                              s.grad_weights, Acc(1));
          differentiate(s, n, vectors, want_q || want_k);
          if (want_v)
            s.grad_v[t].add(block, vectors, g_sums.data, g_sums.sums, g_sums.sums_k,
                            pack_weights<M>(s.scores, n, vectors, s.weights));
          if (want_k)
            s.grad_k[t].add(block, vectors, q_sums.data, q_sums.sums, q_sums.sums_k,
                            pack_weights<M>(s.grad_weights, n, vectors, s.weights));
          if (want_q) sum_grad_queries(s, p.head_dim, t, n, lanes);
        }
        if (want_q) add_in_turn(call, s, b, head, first, n, panels, index, index == tiles.tiles - 1);
      }

    if (want_k) write(call.grad_k, s.grad_k, s, Acc(p.scale), keys, tile, b, kv_head, block, p.head_dim);
    if (want_v) write(call.grad_v, s.grad_v, s, Acc(1), keys, tile, b, kv_head, block, p.value_dim);
  }

  // Scores to weights P, and dP to dS, in place.
  static void differentiate(Scratch& s, int64_t n, int vectors, bool want_scores) {
    for (int64_t r = 0; r < n; ++r)
      for (int i = 0; i < vectors; ++i) {
        Acc *score = s.scores + r * L + i * W, *grad = s.grad_weights + r * L + i * W;
        const Vec<Acc> weight = exp2(load(score) - s.lse[r]);
        store(score, weight);
        if (want_scores) store(grad, weight * (load(grad) - s.delta[r]));
      }
  }

  // The share of panel t in dQ of a block: [panel][channel / L][query][channel % L].
  static void sum_grad_queries(Scratch& s, int64_t channels, int t, int64_t n, int64_t lanes) {
    const Elem* grads = pack_weight_rows<M>(s.grad_weights, n, lanes, s.weights);
    const Strides strides{L / M::kPair, 1};
    const Elem* rows = s.key_rows + t * row_panel_elements<M>(channels);
    for (int64_t c = 0; c * L < channels; ++c) {
      const int vectors = panel_vectors<M>(min(int64_t(L), channels - c * L));
      const Elem* right = rows + c * (L / M::kPair) * L;
      Acc* sum = s.grad_queries + (t * ceil_div(channels, L) + c) * kBlock * L;
      product<M, false>(vectors, grads, strides, n, ceil_div(lanes, M::kPair), right, sum, Acc(1));
    }
  }

  // Add a block's dQ to the running sum when it is tile `index`'s turn; the last tile writes the gradient.
  static void add_in_turn(const Call& call, Scratch& s, int64_t b, int64_t head, int64_t first, int64_t n, int panels,
                          int64_t index, bool last) {
    const Problem& p = call.problem;
    const Box queries = whole(p.queries);
    const int64_t blocks = ceil_div(queries.size(), kBlock);
    int32_t* turn = call.turns + (b * p.heads + head) * blocks + first / kBlock;
    await_turn(turn, int32_t(index));
    offsets(call.running_q, queries, first, n, s.walked);
    Acc* running = at_mutable<Acc>(call.running_q, b, head);
    const Acc scale = Acc(p.scale);
    for (int64_t c = 0; c * L < p.head_dim; ++c) {
      const int64_t columns = min(int64_t(L), p.head_dim - c * L);
      for (int64_t r = 0; r < n; ++r) {
        Acc* sum = running + s.walked[r] + c * L;
        Acc* share = s.grad_queries + (c * kBlock + r) * L;
        const int64_t panel = ceil_div(p.head_dim, L) * kBlock * L;
        if (index > 0)
          for (int64_t d = 0; d < columns; ++d) share[d] = sum[d] + share[d];
        for (int t = 1; t < panels; ++t)
          for (int64_t d = 0; d < columns; ++d) share[d] += share[t * panel + d];
        if (last)
          for (int64_t d = 0; d < columns; ++d) share[d] *= scale;
        else
          for (int64_t d = 0; d < columns; ++d) sum[d] = share[d];
      }
    }
    if (last) {
      offsets(call.grad_q, queries, first, n, s.walked);
      T* grad = at_mutable<T>(call.grad_q, b, head);
      for (int64_t r = 0; r < n; ++r)
        for (int64_t d = 0; d < p.head_dim; ++d)
          narrow(s.grad_queries[(d / L * kBlock + r) * L + d % L], grad + s.walked[r] + d * call.grad_q.channel);
    }
    __atomic_store_n(turn, int32_t(index + 1), __ATOMIC_RELEASE);
  }

  static void load_block(const Map& map, const Box& box, int64_t b, int64_t head, int64_t first, int64_t n,
                         int64_t* offset, Acc* to) {
    offsets(map, box, first, n, offset);
    const Acc* from = at<Acc>(map, b, head);
    for (int64_t r = 0; r < n; ++r) to[r] = from[offset[r]];
  }

  static void write(const Map& map, BlockSum<M>* sums, Scratch& s, Acc factor, const Box& keys, const Tile& tile,
                    int64_t b, int64_t kv_head, int64_t blocks, int64_t channels) {
    for (int i = 0; i < L; ++i) s.factor[i] = factor;
    offsets(map, keys, tile.first, tile.count, s.offset);
    for (int t = 0; t * L < tile.count; ++t)
      unpack_panel<M>(sums[t].finish(blocks), s.factor, at_mutable<T>(map, b, kv_head), s.offset + t * L,
                      panel_lanes<M>(tile.count, t), channels, map.channel);
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
