// Forward: out and lse of a tile of queries (or, for the passes of weights.h, the softmax's two numbers alone), by an
// online softmax in base 2 over blocks of keys.
//
//     S = scale * log2(e) * K Q^T             one product per block and panel     [keys, lanes]
//     m, l, O rescaled where the maximum grew; P = 2^(S - m)
//     l += sum P;  O += V^T P                 the other product                   [channels, lanes]
//
// Per panel and block of 64 keys: 2 * 64 * (D + Dv) * kTile operations, 64 * kTile exponentials; nothing leaves the
// first-level caches but the staged block.
#pragma once

#include "tile.h"

namespace visattn::cpu::VISATTN_ISA {

// The softmax state of a panel's lanes, and the block of scores it works on.
template <class M>
struct OnlineSoftmax {
  using Acc = typename M::Acc;
  using V = Vec<Acc>;
  static constexpr int W = kLanes<Acc>, L = kTile<M>;
  static constexpr Acc kMinusInf = -Acc(__builtin_inf());

  Acc *maximum, *sum;
  Acc* lost;  // what rounding took from `sum` (Kahan), which has one more addend per block

  void start() {
    for (int i = 0; i < L; ++i) maximum[i] = kMinusInf, sum[i] = lost[i] = 0;
  }

  // Replace the scores of n keys by weights relative to the new maximum; rescale what was summed before.
  template <class Rescale>
  VISATTN_INLINE void update(Acc* scores, int64_t n, int vectors, Rescale rescale) {
    for (int v = 0; v < vectors; ++v) {
      const V old = load(maximum + v * W);
      V a = old, b = broadcast(kMinusInf);  // two chains hide the latency
      int64_t r = 0;
      for (; r + 1 < n; r += 2) {
        a = max(a, load(scores + r * L + v * W));
        b = max(b, load(scores + (r + 1) * L + v * W));
      }
      if (r < n) a = max(a, load(scores + r * L + v * W));
      const V top = max(a, b);
      store(maximum + v * W, top);
      const V finite = zero_if_infinite(top);  // -inf - -inf would be NaN
      V l = load(sum + v * W), e = load(lost + v * W);
      if (any_differs(top, old)) {
        const V factor = exp2(old - finite);
        l *= factor;
        e *= factor;
        rescale(v, factor);
      }
      V block0{}, block1{};
      for (r = 0; r + 1 < n; r += 2) {
        const V p0 = exp2(load(scores + r * L + v * W) - finite);
        const V p1 = exp2(load(scores + (r + 1) * L + v * W) - finite);
        block0 += p0;
        block1 += p1;
        store(scores + r * L + v * W, p0);
        store(scores + (r + 1) * L + v * W, p1);
      }
      if (r < n) {
        const V p = exp2(load(scores + r * L + v * W) - finite);
        block0 += p;
        store(scores + r * L + v * W, p);
      }
      const V addend = (block0 + block1) - e, next = l + addend;
      store(lost + v * W, next == -kMinusInf ? V{} : (next - l) - addend);  // inf - inf would be NaN
      store(sum + v * W, next);
    }
  }
};

template <class T>
struct Forward {
  using M = typename Arithmetic<T>::Type;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;
  static constexpr Acc kMinusInf = OnlineSoftmax<M>::kMinusInf;

  // One item's scratch memory.
  struct Scratch {
    Elem *queries, *keys, *values, *weights;
    Acc *scores, *maximum, *sum, *lost, *inverse;
    int64_t *offset, *walked;
    BlockSum<M> out[kPanels];

    Scratch(Arena& arena, const Problem& p)
        : queries(arena.take<Elem>(kPanels * panel_elements<M>(p.head_dim))),
          keys(arena.take<Elem>(staged_elements<M>(p.head_dim))),
          values(arena.take<Elem>(staged_elements<M>(p.value_dim))),
          weights(arena.take<Elem>(kBlock / 2 * L)),
          scores(arena.take<Acc>(kBlock * L)),
          maximum(arena.take<Acc>(kPanels * L)),
          sum(arena.take<Acc>(kPanels * L)),
          lost(arena.take<Acc>(kPanels * L)),
          inverse(arena.take<Acc>(L)),
          offset(arena.take<int64_t>(kPanels * L)),
          walked(arena.take<int64_t>(kBlock)),
          out{{arena, p.value_dim}, {arena, p.value_dim}, {arena, p.value_dim}, {arena, p.value_dim}} {}
  };
  static_assert(kPanels == 4);

  static Tiling<M> tiling(const Call& call, int threads) {
    return {call.n_queries(), call.problem.batch * call.problem.heads, threads};
  }

  static int64_t items(const Call& call, int threads) {
    return tiling(call, threads).tiles * call.problem.batch * call.problem.heads;
  }

  static void run(const Call& call, int threads, int64_t item, Arena arena, bool with_values) {
    const Problem& p = call.problem;
    Scratch s(arena, p);
    const Tiling<M> tiles = tiling(call, threads);
    const Tile tile = tiles[item % tiles.tiles];
    const int64_t head = item / tiles.tiles % p.heads, b = item / tiles.tiles / p.heads;
    const int64_t kv_head = head / p.group();
    const int panels = int(ceil_div(tile.count, L));
    const Acc factor = Acc(p.scale * kLog2E);
    const Box queries = whole(p.queries);

    query_offsets(call, call.q, queries, tile.first, tile.count, s.offset);
    for (int t = 0; t < panels; ++t) {
      pack_panel<M>(
          Rows<T>{at<T>(call.q, b, head), s.offset + t * L, panel_lanes<M>(tile.count, t), p.head_dim, call.q.channel},
          s.queries + t * panel_elements<M>(p.head_dim));
      softmax(s, t).start();
    }

    const Box keys = attended_box(p.pattern, p.keys);
    int64_t block = 0;
    for (int64_t first = 0; first < keys.size(); first += kBlock, ++block) {
      const int64_t n = min(kBlock, keys.size() - first);
      offsets(call.k, keys, first, n, s.walked);
      const Staged<M> k =
          stage<M>(Rows<T>{at<T>(call.k, b, kv_head), s.walked, n, p.head_dim, call.k.channel}, Use::kScores, s.keys);
      Staged<M> v{};
      if (with_values) {
        offsets(call.v, keys, first, n, s.walked);
        v = stage<M>(Rows<T>{at<T>(call.v, b, kv_head), s.walked, n, p.value_dim, call.v.channel}, Use::kSums,
                     s.values);
      }
      for (int t = 0; t < panels; ++t) {
        const int vectors = panel_vectors<M>(panel_lanes<M>(tile.count, t));
        product<M, false>(vectors, k.data, k.scores, n, k.scores_k, s.queries + t * panel_elements<M>(p.head_dim),
                          s.scores, factor);
        softmax(s, t).update(s.scores, n, vectors, [&](int vector, Vec<Acc> by) {
          if (with_values) s.out[t].each(block, [&](Acc* panel) { rescale(panel, p.value_dim, vector, by); });
        });
        if (with_values)
          s.out[t].add(block, vectors, v.data, v.sums, v.sums_k, pack_weights<M>(s.scores, n, vectors, s.weights));
      }
    }
    finish(call, s, tile, b, head, block, with_values);
  }

  static OnlineSoftmax<M> softmax(const Scratch& s, int t) {
    return {s.maximum + t * L, s.sum + t * L, s.lost + t * L};
  }

  static VISATTN_INLINE void rescale(Acc* panel, int64_t rows, int vector, Vec<Acc> factor) {
    for (int64_t c = 0; c < rows; ++c) store(panel + c * L + vector * W, load(panel + c * L + vector * W) * factor);
  }

  static void finish(const Call& call, Scratch& s, const Tile& tile, int64_t b, int64_t head, int64_t blocks,
                     bool with_values) {
    if (!with_values) return finish_statistics(call, s, tile, b, head);
    const Problem& p = call.problem;
    const Box queries = whole(p.queries);
    offsets(call.out, queries, tile.first, tile.count, s.offset);
    for (int t = 0; t * L < tile.count; ++t) {
      const int64_t lanes = panel_lanes<M>(tile.count, t);
      const Acc* sum = s.sum + t * L;
      for (int64_t l = 0; l < lanes; ++l) s.inverse[l] = sum[l] == 0 ? Acc(0) : 1 / sum[l];
      unpack_panel<M>(s.out[t].finish(blocks), s.inverse, at_mutable<T>(call.out, b, head), s.offset + t * L, lanes,
                      p.value_dim, call.out.channel);
    }
    offsets(call.lse, queries, tile.first, tile.count, s.offset);
    Acc* lse = at_mutable<Acc>(call.lse, b, head);
    for (int64_t l = 0; l < tile.count; ++l) {
      const Acc m = s.maximum[l], sum = s.sum[l];
      lse[s.offset[l]] = sum == 0 ? kMinusInf : m * Acc(kLn2) + natural_log(sum);
    }
  }

  static void finish_statistics(const Call& call, Scratch& s, const Tile& tile, int64_t b, int64_t head) {
    const Box box = statistics_box(call);
    offsets(call.maximum, box, tile.first, tile.count, s.offset);
    for (int64_t l = 0; l < tile.count; ++l) {
      const Acc m = s.maximum[l];
      at_mutable<Acc>(call.maximum, b, head)[s.offset[l]] = m - m == 0 ? m : Acc(0);
    }
    offsets(call.inverse, box, tile.first, tile.count, s.offset);
    for (int64_t l = 0; l < tile.count; ++l)
      at_mutable<Acc>(call.inverse, b, head)[s.offset[l]] = s.sum[l] == 0 ? Acc(0) : 1 / s.sum[l];
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
