// The attention map, read without storing it: its rows at some queries, and its column sums.
//
// Weights are P = e^(S - maximum) * inverse, from the statistics computed before. (From lse they would inherit the
// rounding of a logarithm.) Rows hold their queries in the lanes and walk keys; sums hold keys and walk queries.
#pragma once

#include "backward_keys.h"

namespace visattn::cpu::VISATTN_ISA {

template <class Acc>
VISATTN_INLINE Vec<Acc> weight(Vec<Acc> score, Vec<Acc> maximum, Vec<Acc> inverse, bool guarded) {
  const Vec<Acc> w = exp(score - maximum) * inverse;
  return guarded ? (score == -Acc(__builtin_inf()) ? Vec<Acc>{} : w) : w;
}

template <class T>
struct MapRows {
  using Walker = Walk<T>;
  using M = typename Walker::M;
  using Acc = typename M::Acc;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  struct Scratch {
    Walker walk;
    Acc *maximum, *inverse;
    int64_t* walked;

    Scratch(Arena& arena, const Call& call, int threads)
        : walk(arena, call, true, threads, false, false, false),
          maximum(arena.take<Acc>(kPanels * L)),
          inverse(arena.take<Acc>(kPanels * L)),
          walked(arena.take<int64_t>(kBlock)) {}
  };

  static Work plan(const Call& call, int threads) {
    Arena counting{nullptr};
    Scratch s(counting, call, threads);
    return {s.walk.plan.items(), counting.used, 0};
  }

  static void run(const Call& call, int threads, int64_t item, Arena arena) {
    Scratch s(arena, call, threads);
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    walk.set_head(item % walk.plan.heads);
    walk.tiles(item, [&](const typename Plan<M>::Pair&) {
      walk.start_tile();
      walk.start_head();
      walk.load_lanes(call.maximum, s.maximum);
      walk.load_lanes(call.inverse, s.inverse);
      walk.blocks([&] {
        const Map keys{nullptr, 0, call.problem.keys.w, 1, 0, 0};
        walk.block.offsets(tile.walked_y, tile.walked_x, keys, s.walked);
        for (int t = 0; t < tile.panels; ++t) {
          walk.score(t);
          walk.vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
            for (int64_t r = row; r < end; ++r) {
              if (s.walked[r] == kNowhere) continue;
              const Vec<Acc> w = weight<Acc>(load(walk.scores + r * L + at_lane), load(s.maximum + lane),
                                             load(s.inverse + lane), walk.guarded);
              for (int l = 0; l < W; ++l)
                if (tile.active[lane + l] && (!tile.masked || inside(tile, walk.block, r, lane + l, walk)))
                  (at_mutable<Acc>(call.weights, walk.b, walk.head) +
                   tile.point[lane + l] * call.weights.y)[s.walked[r]] = w[l];
            }
          });
        }
      });
    });
  }

  // Whether the pattern has the pair: what it has not another part may have written.
  static bool inside(const Tile<M>& tile, const Block<Acc>& block, int64_t r, int l, const Walker& walk) {
    const int64_t y = block.y[r] - tile.first_y[l], x = block.x[r] - tile.first_x[l];
    const bool own = walk.plan.part.others && block.y[r] == tile.y[l] && block.x[r] == tile.x[l];
    return y >= 0 && y < tile.size_y[l] && x >= 0 && x < tile.size_x[l] && !own;
  }
};

template <class T>
struct Received {
  using Walker = Walk<T>;
  using M = typename Walker::M;
  using Acc = typename M::Acc;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;
  static constexpr int kFlush = BlockSums<M>::kFlush;

  struct Scratch {
    Walker walk;
    Acc *maximum, *inverse, *received, *part;
    int64_t* walked;

    Scratch(Arena& arena, const Call& call, int threads)
        : walk(arena, call, false, threads, false, false, false),
          maximum(arena.take<Acc>(kBlock)),
          inverse(arena.take<Acc>(kBlock)),
          received(arena.take<Acc>(kPanels * L)),
          part(arena.take<Acc>(kPanels * L)),
          walked(arena.take<int64_t>(kBlock)) {}
  };

  static Work plan(const Call& call, int threads) {
    Arena counting{nullptr};
    Scratch s(counting, call, threads);
    return {s.walk.plan.items(), counting.used, 0};
  }

  static void run(const Call& call, int threads, int64_t item, Arena arena) {
    Scratch s(arena, call, threads);
    Walker& walk = s.walk;
    const int64_t kv_head = item % walk.plan.heads;
    walk.tiles(item, [&](const typename Plan<M>::Pair&) { run_tile(call, s, kv_head); });
  }

  static void run_tile(const Call& call, Scratch& s, int64_t kv_head) {
    Walker& walk = s.walk;
    const Tile<M>& tile = walk.tile;
    const int64_t group = call.problem.group();
    walk.kv_head = kv_head;
    walk.start_tile();
    for (int i = 0; i < kPanels * L; ++i) s.received[i] = s.part[i] = 0;
    int64_t blocks = 0;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      walk.set_head(head);
      walk.start_head();
      walk.blocks([&] {
        GradKeys<T>::load_block(walk, call.maximum, s.walked, s.maximum);
        GradKeys<T>::load_block(walk, call.inverse, s.walked, s.inverse);
        for (int t = 0; t < tile.panels; ++t) {
          walk.score(t);
          walk.vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
            Vec<Acc> sum{};
            for (int64_t r = row; r < end; ++r)
              sum += weight<Acc>(load(walk.scores + r * L + at_lane), broadcast(s.maximum[r]), broadcast(s.inverse[r]),
                                 walk.guarded);
            store(s.part + lane, load(s.part + lane) + sum);
          });
        }
        if (++blocks % kFlush == 0) flush(s);
      });
    }
    flush(s);
    tile.offsets(call.received, walk.offset);
    Acc* received = at_mutable<Acc>(call.received, walk.b, kv_head);
    for (int v = 0; v < tile.vectors; ++v)
      for (int l = tile.lane_of(v), end = l + W; l < end; ++l)
        if (tile.active[l])
          received[walk.offset[l]] = s.received[l] + (call.part > 0 ? received[walk.offset[l]] : Acc(0));
  }

  static void flush(Scratch& s) {
    for (int i = 0; i < kPanels * L; ++i) s.received[i] += s.part[i], s.part[i] = 0;
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
