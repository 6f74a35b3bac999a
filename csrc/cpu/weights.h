// The attention map, read without storing it: its rows at some queries, and its column sums.
//
// Both hold keys in the lanes and walk queries, with weights P = 2^(S - maximum) * inverse from the statistics
// computed before. (From lse the weights would inherit the rounding of a logarithm.)
#pragma once

#include "backward.h"

namespace visattn::cpu::VISATTN_ISA {

template <class T>
struct Weights {
  using M = typename Arithmetic<T>::Type;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  struct Scratch {
    Elem *keys, *queries;
    Acc *scores, *maximum, *inverse, *received, *part;
    int64_t *offset, *walked;

    Scratch(Arena& arena, const Problem& p)
        : keys(arena.take<Elem>(kPanels * panel_elements<M>(p.head_dim))),
          queries(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          scores(arena.take<Acc>(kBlock * L)),
          maximum(arena.take<Acc>(kBlock)),
          inverse(arena.take<Acc>(kBlock)),
          received(arena.take<Acc>(kPanels * L)),
          part(arena.take<Acc>(kPanels * L)),
          offset(arena.take<int64_t>(kPanels * L)),
          walked(arena.take<int64_t>(kBlock)) {}
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
    const int64_t n_queries = call.n_queries();
    const Box statistics = statistics_box(call);

    offsets(call.k, keys, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t)
      pack_panel<M>(Rows<T>{at<T>(call.k, b, kv_head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.head_dim,
                            call.k.channel},
                    s.keys + t * panel_elements<M>(p.head_dim));
    for (int i = 0; i < kPanels * L; ++i) s.received[i] = s.part[i] = 0;

    int64_t block = 0;
    for (int64_t head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head)
      for (int64_t first = 0; first < n_queries; first += kBlock, ++block) {
        const int64_t n = min(kBlock, n_queries - first);
        query_offsets(call, call.q, whole(p.queries), first, n, s.walked);
        const Staged<M> q =
            stage<M>(Rows<T>{at<T>(call.q, b, head), s.walked, n, p.head_dim, call.q.channel}, Use::kScores, s.queries);
        Backward<T>::load_block(call.maximum, statistics, b, head, first, n, s.walked, s.maximum);
        Backward<T>::load_block(call.inverse, statistics, b, head, first, n, s.walked, s.inverse);
        for (int t = 0; t < panels; ++t) {
          const int64_t lanes = panel_lanes<M>(tile.count, t);
          const int vectors = panel_vectors<M>(lanes);
          product<M, false>(vectors, q.data, q.scores, n, q.scores_k, s.keys + t * panel_elements<M>(p.head_dim),
                            s.scores, factor);
          for (int i = 0; i < vectors; ++i) {
            Vec<Acc> sum{};
            for (int64_t r = 0; r < n; ++r) {
              Acc* score = s.scores + r * L + i * W;
              const Vec<Acc> weight = exp2(load(score) - s.maximum[r]) * s.inverse[r];
              store(score, weight);
              sum += weight;
            }
            Acc* part = s.part + t * L + i * W;
            store(part, load(part) + sum);
          }
          if (call.weights.data)
            for (int64_t r = 0; r < n; ++r)
              __builtin_memcpy(
                  at_mutable<Acc>(call.weights, b, head) + (first + r) * call.weights.x + tile.first + t * L,
                  s.scores + r * L, lanes * sizeof(Acc));
        }
        if (block % BlockSum<M>::kFlush == BlockSum<M>::kFlush - 1) flush(s);
      }
    flush(s);

    if (!call.received.data) return;
    offsets(call.received, keys, tile.first, tile.count, s.offset);
    Acc* received = at_mutable<Acc>(call.received, b, kv_head);
    for (int64_t l = 0; l < tile.count; ++l) received[s.offset[l]] = s.received[l];
  }

  static void flush(Scratch& s) {
    for (int i = 0; i < kPanels * L; ++i) s.received[i] += s.part[i], s.part[i] = 0;
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
