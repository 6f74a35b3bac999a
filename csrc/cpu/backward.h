// Backward: weights are computed again from lse, in two passes that each write their own results, so that nothing is
// added from two threads and every gradient is the same for any number of them.
//
//     P = 2^(S - lse)      dP = dO V^T      dS = P * (dP - delta)      delta_i = out_i · dO_i - dlse_i
//
//     queries resident:  dQ  = scale * sum over keys of dS k_j                   (3 products)
//     keys resident:     dV  = sum over queries of P dO_i                        (4 products)
//                        dK  = scale * sum over queries of dS q_i
#pragma once

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

template <class T>
struct GradQuery {
  using M = typename Arithmetic<T>::Type;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  struct Scratch {
    Elem *queries, *grads, *key_scores, *key_sums, *values, *weights;
    Acc *scores, *grad_weights, *lse, *delta, *factor;
    int64_t *offset, *walked;
    BlockSum<M> grad[kPanels];

    Scratch(Arena& arena, const Problem& p)
        : queries(arena.take<Elem>(kPanels * panel_elements<M>(p.head_dim))),
          grads(arena.take<Elem>(kPanels * panel_elements<M>(p.value_dim))),
          key_scores(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          key_sums(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          values(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          weights(arena.take<Elem>(kBlock / 2 * L)),
          scores(arena.take<Acc>(kBlock * L)),
          grad_weights(arena.take<Acc>(kBlock * L)),
          lse(arena.take<Acc>(kPanels * L)),
          delta(arena.take<Acc>(kPanels * L)),
          factor(arena.take<Acc>(L)),
          offset(arena.take<int64_t>(kPanels * L)),
          walked(arena.take<int64_t>(kBlock)),
          grad{{arena, p.head_dim}, {arena, p.head_dim}, {arena, p.head_dim}, {arena, p.head_dim}} {}
  };

  static Tiling<M> tiling(const Call& call, int threads) {
    return {call.problem.queries.size(), call.problem.batch * call.problem.heads, threads};
  }

  static int64_t items(const Call& call, int threads) {
    return tiling(call, threads).tiles * call.problem.batch * call.problem.heads;
  }

  static void run(const Call& call, int threads, int64_t item, Arena arena) {
    const Problem& p = call.problem;
    Scratch s(arena, p);
    const Tiling<M> tiles = tiling(call, threads);
    const Tile tile = tiles[item % tiles.tiles];
    const int64_t head = item / tiles.tiles % p.heads, b = item / tiles.tiles / p.heads;
    const int64_t kv_head = head / p.group();
    const int panels = int(ceil_div(tile.count, L));
    const Acc factor = Acc(p.scale * kLog2E);
    const Box queries = whole(p.queries);

    offsets(call.q, queries, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t)
      pack_panel<M>(
          Rows<T>{at<T>(call.q, b, head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.head_dim, call.q.channel},
          s.queries + t * panel_elements<M>(p.head_dim));
    offsets(call.grad_out, queries, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t)
      pack_panel<M>(Rows<T>{at<T>(call.grad_out, b, head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.value_dim,
                            call.grad_out.channel},
                    s.grads + t * panel_elements<M>(p.value_dim));
    load_lanes(call.lse, queries, b, head, tile, s.offset, s.lse);
    load_lanes(call.delta, queries, b, head, tile, s.offset, s.delta);
    for (int64_t l = 0; l < tile.count; ++l) s.lse[l] = lse2(s.lse[l]);

    const Box keys = attended_box(p.pattern, p.keys);
    int64_t block = 0;
    for (int64_t first = 0; first < keys.size(); first += kBlock, ++block) {
      const int64_t n = min(kBlock, keys.size() - first);
      offsets(call.k, keys, first, n, s.walked);
      const Rows<T> key_rows{at<T>(call.k, b, kv_head), s.walked, n, p.head_dim, call.k.channel};
      const Staged<M> k = stage<M>(key_rows, Use::kScores, s.key_scores);
      const Staged<M> k_sums = M::kPair == 1 ? k : stage<M>(key_rows, Use::kSums, s.key_sums);
      offsets(call.v, keys, first, n, s.walked);
      const Staged<M> v = stage<M>(Rows<T>{at<T>(call.v, b, kv_head), s.walked, n, p.value_dim, call.v.channel},
                                   Use::kScores, s.values);
      for (int t = 0; t < panels; ++t) {
        const int vectors = panel_vectors<M>(panel_lanes<M>(tile.count, t));
        product<M, false>(vectors, k.data, k.scores, n, k.scores_k, s.queries + t * panel_elements<M>(p.head_dim),
                          s.scores, factor);
        product<M, false>(vectors, v.data, v.scores, n, v.scores_k, s.grads + t * panel_elements<M>(p.value_dim),
                          s.grad_weights, Acc(1));
        for (int i = 0; i < vectors; ++i) {
          const Vec<Acc> lse = load(s.lse + t * L + i * W), delta = load(s.delta + t * L + i * W);
          for (int64_t r = 0; r < n; ++r) {
            Acc* score = s.scores + r * L + i * W;
            const Vec<Acc> weight = exp2(load(score) - lse);
            store(score, weight * (load(s.grad_weights + r * L + i * W) - delta));
          }
        }
        s.grad[t].add(block, vectors, k_sums.data, k_sums.sums, k_sums.sums_k,
                      pack_weights<M>(s.scores, n, vectors, s.weights));
      }
    }

    for (int i = 0; i < L; ++i) s.factor[i] = Acc(p.scale);
    offsets(call.grad_q, queries, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t)
      unpack_panel<M>(s.grad[t].finish(block), s.factor, at_mutable<T>(call.grad_q, b, head), s.offset + t * L,
                      panel_lanes<M>(tile.count, t), p.head_dim, call.grad_q.channel);
  }

  // One number per query of a tile; lanes that are left over get 0.
  static void load_lanes(const Map& map, const Box& box, int64_t b, int64_t head, const Tile& tile, int64_t* offset,
                         Acc* to) {
    offsets(map, box, tile.first, tile.count, offset);
    const Acc* from = at<Acc>(map, b, head);
    for (int64_t l = 0; l < tile.count; ++l) to[l] = from[offset[l]];
    for (int64_t l = tile.count; l < ceil_div(tile.count, L) * L; ++l) to[l] = 0;
  }
};

template <class T>
struct GradKeyValue {
  using M = typename Arithmetic<T>::Type;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  struct Scratch {
    Elem *keys, *values, *query_scores, *query_sums, *grad_scores, *grad_sums, *weights;
    Acc *scores, *grad_weights, *factor, *lse, *delta;
    int64_t *offset, *walked;
    BlockSum<M> grad_k[kPanels], grad_v[kPanels];

    Scratch(Arena& arena, const Problem& p)
        : keys(arena.take<Elem>(kPanels * panel_elements<M>(p.head_dim))),
          values(arena.take<Elem>(kPanels * panel_elements<M>(p.value_dim))),
          query_scores(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          query_sums(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          grad_scores(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          grad_sums(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          weights(arena.take<Elem>(kBlock / 2 * L)),
          scores(arena.take<Acc>(kBlock * L)),
          grad_weights(arena.take<Acc>(kBlock * L)),
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
    const Tile tile = tiles[item % tiles.tiles];
    const int64_t kv_head = item / tiles.tiles % p.kv_heads, b = item / tiles.tiles / p.kv_heads;
    const int panels = int(ceil_div(tile.count, L));
    const Acc factor = Acc(p.scale * kLog2E);
    const Box keys = whole(p.keys);
    const bool want_k = call.grad_k.data != nullptr, want_v = call.grad_v.data != nullptr;

    offsets(call.k, keys, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t)
      pack_panel<M>(Rows<T>{at<T>(call.k, b, kv_head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.head_dim,
                            call.k.channel},
                    s.keys + t * panel_elements<M>(p.head_dim));
    offsets(call.v, keys, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t)
      pack_panel<M>(Rows<T>{at<T>(call.v, b, kv_head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.value_dim,
                            call.v.channel},
                    s.values + t * panel_elements<M>(p.value_dim));

    const Box queries = attended_box(p.pattern, p.queries);
    int64_t block = 0;
    for (int64_t head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head)
      for (int64_t first = 0; first < queries.size(); first += kBlock, ++block) {
        const int64_t n = min(kBlock, queries.size() - first);
        offsets(call.q, queries, first, n, s.walked);
        const Rows<T> query_rows{at<T>(call.q, b, head), s.walked, n, p.head_dim, call.q.channel};
        const Staged<M> q = stage<M>(query_rows, Use::kScores, s.query_scores);
        const Staged<M> q_sums = M::kPair == 1 ? q : stage<M>(query_rows, Use::kSums, s.query_sums);
        offsets(call.grad_out, queries, first, n, s.walked);
        const Rows<T> grad_rows{at<T>(call.grad_out, b, head), s.walked, n, p.value_dim, call.grad_out.channel};
        const Staged<M> g = stage<M>(grad_rows, Use::kScores, s.grad_scores);
        const Staged<M> g_sums = M::kPair == 1 ? g : stage<M>(grad_rows, Use::kSums, s.grad_sums);
        load_block(call.lse, queries, b, head, first, n, s.walked, s.lse);
        load_block(call.delta, queries, b, head, first, n, s.walked, s.delta);
        for (int64_t r = 0; r < n; ++r) s.lse[r] = lse2(s.lse[r]);

        for (int t = 0; t < panels; ++t) {
          const int vectors = panel_vectors<M>(panel_lanes<M>(tile.count, t));
          product<M, false>(vectors, q.data, q.scores, n, q.scores_k, s.keys + t * panel_elements<M>(p.head_dim),
                            s.scores, factor);
          for (int64_t r = 0; r < n; ++r)
            for (int i = 0; i < vectors; ++i) {
              Acc* score = s.scores + r * L + i * W;
              store(score, exp2(load(score) - s.lse[r]));
            }
          if (want_v)
            s.grad_v[t].add(block, vectors, g_sums.data, g_sums.sums, g_sums.sums_k,
                            pack_weights<M>(s.scores, n, vectors, s.weights));
          if (!want_k) continue;
          product<M, false>(vectors, g.data, g.scores, n, g.scores_k, s.values + t * panel_elements<M>(p.value_dim),
                            s.grad_weights, Acc(1));
          for (int64_t r = 0; r < n; ++r)
            for (int i = 0; i < vectors; ++i) {
              Acc* score = s.scores + r * L + i * W;
              store(score, load(score) * (load(s.grad_weights + r * L + i * W) - s.delta[r]));
            }
          s.grad_k[t].add(block, vectors, q_sums.data, q_sums.sums, q_sums.sums_k,
                          pack_weights<M>(s.scores, n, vectors, s.weights));
        }
      }

    if (want_k) write(call.grad_k, s.grad_k, s, Acc(p.scale), keys, tile, b, kv_head, block, p.head_dim);
    if (want_v) write(call.grad_v, s.grad_v, s, Acc(1), keys, tile, b, kv_head, block, p.value_dim);
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
