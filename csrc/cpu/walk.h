// What every pass shares: which tile of positions is resident in the lanes of vectors, and in which blocks the
// positions of the other side are walked.
//
// A pass takes one side as resident (queries in the forward and for the gradient of q, keys for those of k and v) and
// cuts its positions, region by region of the pattern, into tiles. Sums, maxima and factors of a lane are elementwise
// operations on vectors: no horizontal step, no transposed copy of the walked side, no padding of D or Dv.
//
//     all pairs of a region     a tile is a run of its positions; the walked box is the whole region
//     near                      a vector is a small rectangle of positions, a tile a pile of such vectors:
//
//         2 x 8 queries  [ vector 0 ]      each vector walks its own rows of the tile's box of keys,
//                        [ vector 1 ]      which are a range in raster order
//                        [ vector 2 ]
//
// Neither the blocks nor the vectors of a near tile depend on the number of threads, so that no bit does.
#pragma once

#include "panel.h"

namespace visattn::cpu::VISATTN_ISA {

// What the instruction set's engine runs for a dtype.
template <class Storage>
struct Arithmetic {
  using Type = Plain<float>;
};
template <>
struct Arithmetic<double> {
  using Type = Plain<double>;
};
#if defined(__AVX512BF16__)
template <>
struct Arithmetic<bf16> {
  using Type = Pairs;
};
#endif

constexpr int64_t kMaxLaneTable = 4 << 20;  // bytes that one term's table of the resident lanes should take at most

template <class T>
VISATTN_INLINE const T* at(const Map& map, int64_t b, int64_t h) {
  return (const T*)map.data + map.at(b, h);
}

template <class T>
VISATTN_INLINE T* at_mutable(const Map& map, int64_t b, int64_t h) {
  return (T*)map.data + map.at(b, h);
}

// How a lane index varies in a vector: all lanes alike, each one more than the last, or anyhow.
enum class Spread { kUniform, kConsecutive, kAny };

template <class M>
struct Tile {
  using Acc = typename M::Acc;
  static constexpr int L = kTile<M>, W = kLanes<Acc>, kMaxVectors = kPanels * kVectors;

  Line resident_y, resident_x, walked_y, walked_x;
  const int64_t* points;  // of this tile's lanes, or null
  int64_t first_point;
  int64_t count;  // active lanes
  int vectors, panels;
  int panel_first[kPanels + 1];                // first vector of each panel
  int64_t from[kMaxVectors], to[kMaxVectors];  // what each vector walks of the box
  Spread spread_y[kMaxVectors], spread_x[kMaxVectors];
  int64_t origin_y, origin_x;
  Box box;  // walked, by index
  bool masked;

  // By lane in memory (panel * L + vector * W + lane): its index on either axis, and the walked indices it sees.
  Index<Acc> y[kPanels * L], x[kPanels * L];
  Index<Acc> first_y[kPanels * L], size_y[kPanels * L], first_x[kPanels * L], size_x[kPanels * L];
  bool active[kPanels * L];
  int64_t point[kPanels * L];

  int panel_of(int vector) const {
    int p = 0;
    while (vector >= panel_first[p + 1]) ++p;
    return p;
  }
  int lane_of(int vector) const {
    const int p = panel_of(vector);
    return p * L + (vector - panel_first[p]) * W;
  }
  int panel_vectors(int p) const { return panel_first[p + 1] - panel_first[p]; }

  // Offsets of the lanes into a map of the resident side.
  void offsets(const Map& map, int64_t* out) const {
    for (int v = 0; v < vectors; ++v)
      for (int l = lane_of(v), end = l + W; l < end; ++l)
        out[l] = active[l] ? resident_y.at(y[l]) * map.y + resident_x.at(x[l]) * map.x : kNowhere;
  }

  // The same for what is kept per query: points have theirs in a row.
  void result_offsets(const Map& map, int64_t* out) const {
    if (!points) return offsets(map, out);
    for (int v = 0; v < vectors; ++v)
      for (int l = lane_of(v), end = l + W; l < end; ++l) out[l] = active[l] ? point[l] * map.x : kNowhere;
  }
};

// A block of walked positions: a run of the box in raster order.
template <class Acc>
struct Block {
  int64_t first, n;
  Index<Acc> y[kBlock], x[kBlock];

  void set(const Box& box, int64_t start, int64_t most) {
    first = start;
    n = min(most, box.size() - start);
    int64_t row = start / box.w, column = start % box.w;
    for (int64_t r = 0; r < n; ++r) {
      y[r] = Index<Acc>(box.y + row);
      x[r] = Index<Acc>(box.x + column);
      if (++column == box.w) column = 0, ++row;
    }
  }

  void offsets(const Line& line_y, const Line& line_x, const Map& map, int64_t* out) const {
    for (int64_t r = 0; r < n; ++r) {
      const bool there = y[r] >= 0 && y[r] < line_y.count && x[r] >= 0 && x[r] < line_x.count;
      out[r] = there ? line_y.at(y[r]) * map.y + line_x.at(x[r]) * map.x : kNowhere;
    }
  }
};

// How one side of a part is cut into tiles, and how tiles are grouped into items.
template <class M>
struct Plan {
  using Acc = typename M::Acc;
  static constexpr int W = kLanes<Acc>, L = kTile<M>;
  static constexpr int kNearVectors = 64 / W < kPanels * kVectors ? 64 / W : kPanels * kVectors;

  const Call& call;
  Part part;
  bool queries;  // whether queries are resident
  bool near;
  int64_t regions, tiles;  // tiles of the largest region
  int panel_size;          // vectors of a panel, whatever the number of threads: sums over a panel's lanes depend on it
  int64_t capacity;        // lanes of a tile that is a run; points of one
  int64_t vector_h, vector_w;  // rectangle of a near vector
  bool piled;                  // near vectors lie on top of each other, else side by side
  int64_t tiles_x;
  int64_t heads;  // resident heads: those of q, or those of k
  int64_t pairs, chunk, chunks;

  // `shares`: whether gradients of tables are summed per item: then no choice may depend on the number of threads.
  // `by_tile`: whether a result of one map depends on sums over all lanes of a tile: then its width may depend on
  // neither threads nor maps.
  Plan(const Call& call, bool queries, int threads, bool shares, bool by_tile)
      : call(call),
        part(part_of(call.problem.pattern, call.part, call.problem.queries, call.problem.keys)),
        queries(queries),
        near(part.near()),
        panel_size(kVectors),
        capacity(0),
        vector_h(1),
        vector_w(1),
        piled(true),
        tiles_x(1) {
    const Problem& p = call.problem;
    if (shares) threads = 8;
    heads = queries ? p.heads : p.kv_heads;
    regions = part.classes();
    const Grid& grid = queries ? p.queries : p.keys;
    const int64_t h = part.y.longest(grid.h), w = part.x.longest(grid.w);
    if (near) {
      choose_vector(h, w);
      const int64_t piles = ceil_div(h, vector_h);
      piled = piles > 1;
      tiles_x = piled ? ceil_div(w, vector_w) : ceil_div(ceil_div(w, vector_w), kNearVectors);
      tiles = tiles_x * (piled ? ceil_div(piles, kNearVectors) : 1);
    } else {
      const int64_t others = by_tile ? regions : p.batch * heads * regions;
      const int64_t vectors = ceil_div(h * w, W);
      panel_size = int(ceil_div(vectors, ceil_div(vectors, kVectors)));
      capacity = panels(ceil_div(vectors, panel_size), others, by_tile ? 2 : threads) * panel_size * W;
      tiles = ceil_div(h * w, capacity);
    }
    if (call.points && queries) {
      const bool together = !near && regions == 1;
      capacity = together ? min(capacity, ceil_div(call.n_points, W) * W) : 1;
      regions = 1;
      tiles = ceil_div(call.n_points, capacity);
    }
    pairs = p.batch * regions * tiles;
    chunks = shares ? min(pairs, 32) : min(pairs, max(1, ceil_div(16 * int64_t(threads), heads)));
    chunk = chunks ? ceil_div(pairs, chunks) : 1;
    chunks = ceil_div(pairs, chunk);
  }

  // As many panels as leave every thread a few tiles to balance with, and keep the tables of terms in the cache.
  int64_t panels(int64_t all, int64_t others, int threads) const {
    const int64_t wanted = 4 * int64_t(threads);
    const int64_t widest =
        max(part.y.longest(max(part.y.queries, part.y.keys)), part.x.longest(max(part.x.queries, part.x.keys)));
    for (int n = kPanels; n > 1; --n)
      if (ceil_div(all, n) * others >= wanted && n * L * widest * int64_t(sizeof(Acc)) <= kMaxLaneTable) return n;
    return 1;
  }

  // The rectangle of W positions with the least to walk, over all vectors.
  void choose_vector(int64_t h, int64_t w) {
    int64_t best = -1;
    for (int64_t width = 1; width <= W; width *= 2) {
      const int64_t height = W / width;
      const int64_t walked = (part.y.near() ? min(height, h) + part.y.size - 1 : h) *
                             (part.x.near() ? min(width, w) + part.x.size - 1 : w);
      const int64_t cost = ceil_div(h, height) * ceil_div(w, width) * walked;
      if (best < 0 || cost <= best) best = cost, vector_h = height, vector_w = width;
    }
  }

  int64_t items() const { return chunks * heads; }

  // The most indices of an axis (0: height, 1: width) that a tile's lanes, and what they walk, stretch over.
  int64_t resident_extent(int axis) const {
    const Axis& a = axis ? part.x : part.y;
    if (!near) return a.longest(queries ? a.queries : a.keys);
    if (axis) return vector_w * (piled ? 1 : kNearVectors);
    return vector_h * (piled ? kNearVectors : 1);
  }
  int64_t walked_extent(int axis) const {
    const Axis& a = axis ? part.x : part.y;
    return a.near() ? resident_extent(axis) + 2 * (a.size - 1) : a.longest(queries ? a.keys : a.queries);
  }

  struct Pair {
    int64_t b, region, tile;
  };

  // Tiles of one region must be taken in their order, and those of one map far apart in time, where they add to the
  // same sums; near tiles share what they walk with their neighbours.
  Pair pair(int64_t i) const {
    const int64_t batch = call.problem.batch;
    if (near) return {i / (regions * tiles), i / tiles % regions, i % tiles};
    return {i % batch, i / batch % regions, i / batch / regions};
  }

  // Fill in tile number `index` of a region; false if the region has no such tile.
  bool fill(int64_t region_index, int64_t index, Tile<M>& t) const {
    t.points = nullptr;
    t.first_point = 0;
    if (call.points && queries) {
      t.points = call.points;
      t.first_point = index * capacity;
      const int64_t* point = call.points + 2 * t.first_point;
      region_index = part.y.class_of(point[0]) * part.x.classes() + part.x.class_of(point[1]);
    }
    const Region region = region_of(part, region_index);
    t.resident_y = queries ? region.query_y : region.key_y;
    t.resident_x = queries ? region.query_x : region.key_x;
    t.walked_y = queries ? region.key_y : region.query_y;
    t.walked_x = queries ? region.key_x : region.query_x;
    t.masked = near || part.others;
    const int64_t h = t.resident_y.count, w = t.resident_x.count;
    if (t.points)
      fill_points(t);
    else if (near ? !fill_near(t, index, h, w) : !fill_run(t, index, h, w))
      return false;

    Box resident{t.y[0], t.x[0], 1, 1};
    if (near) {
      int64_t end_y = t.y[0] + 1, end_x = t.x[0] + 1;
      for (int v = 0; v < t.vectors; ++v)
        for (int l = t.lane_of(v), end = l + W; l < end; ++l)
          if (t.active[l]) end_y = max(end_y, t.y[l] + 1), end_x = max(end_x, t.x[l] + 1);
      resident.h = end_y - resident.y, resident.w = end_x - resident.x;
    }
    t.origin_y = resident.y, t.origin_x = resident.x;
    t.box = walked_box(region, resident);
    for (int v = 0; v < t.vectors; ++v) finish_vector(t, v);
    return true;
  }

  Box walked_box(const Region& region, const Box& resident) const {
    return queries ? keys_of(part, region, resident) : queries_of(part, region, resident);
  }

  void spread_panels(Tile<M>& t) const {
    t.panels = int(ceil_div(t.vectors, panel_size));
    for (int p = 0; p <= t.panels; ++p) t.panel_first[p] = int(min(p * panel_size, t.vectors));
  }

  bool fill_run(Tile<M>& t, int64_t index, int64_t h, int64_t w) const {
    const int64_t first = index * capacity;
    t.count = min(capacity, h * w - first);
    if (t.count <= 0) return false;
    t.vectors = int(ceil_div(t.count, W));
    spread_panels(t);
    int64_t i = first, y = first / w, x = first % w;
    for (int v = 0; v < t.vectors; ++v)
      for (int l = t.lane_of(v), end = l + W; l < end; ++l, ++i) {
        t.y[l] = Index<Acc>(y), t.x[l] = Index<Acc>(x);
        t.active[l] = i - first < t.count;
        if (++x == w && i + 1 - first < t.count) x = 0, ++y;
      }
    return true;
  }

  bool fill_near(Tile<M>& t, int64_t index, int64_t h, int64_t w) const {
    const int64_t step_y = piled ? vector_h : 0, step_x = piled ? 0 : vector_w;
    const int64_t y = piled ? index / tiles_x * kNearVectors * vector_h : 0;
    const int64_t x = index % tiles_x * (piled ? vector_w : kNearVectors * vector_w);
    if (y >= h || x >= w) return false;
    t.vectors = int(min(kNearVectors, piled ? ceil_div(h - y, vector_h) : ceil_div(w - x, vector_w)));
    spread_panels(t);
    t.count = 0;
    for (int v = 0; v < t.vectors; ++v)
      for (int l = t.lane_of(v), i = 0; i < W; ++i, ++l) {
        const int64_t ly = y + v * step_y + i / vector_w, lx = x + v * step_x + i % vector_w;
        t.y[l] = Index<Acc>(ly), t.x[l] = Index<Acc>(lx);
        t.active[l] = ly < h && lx < w;
        t.count += t.active[l];
      }
    return true;
  }

  void fill_points(Tile<M>& t) const {
    t.count = min(capacity, call.n_points - t.first_point);
    t.vectors = int(ceil_div(t.count, W));
    spread_panels(t);
    int64_t i = 0;
    for (int v = 0; v < t.vectors; ++v)
      for (int l = t.lane_of(v), end = l + W; l < end; ++l, ++i) {
        const int64_t* point = call.points + 2 * (t.first_point + min(i, t.count - 1));
        t.y[l] = Index<Acc>(part.y.index_of(point[0])), t.x[l] = Index<Acc>(part.x.index_of(point[1]));
        t.active[l] = i < t.count;
        t.point[l] = t.first_point + i;
      }
  }

  // What a vector's lanes see of the box.
  void finish_vector(Tile<M>& t, int v) const {
    const int first = t.lane_of(v);
    t.from[v] = 0, t.to[v] = t.box.size();
    t.spread_y[v] = spread(t.y + first), t.spread_x[v] = spread(t.x + first);
    if (!t.masked) return;
    const int64_t n_y = t.walked_y.count, n_x = t.walked_x.count;
    int64_t y0 = t.box.y + t.box.h, y1 = t.box.y, x0 = t.box.x + t.box.w, x1 = t.box.x;
    for (int l = first; l < first + W; ++l) {
      const Range y = queries ? part.y.keys_of(t.y[l], n_y) : part.y.queries_of(t.y[l], n_y);
      const Range x = queries ? part.x.keys_of(t.x[l], n_x) : part.x.queries_of(t.x[l], n_x);
      t.first_y[l] = Index<Acc>(y.first), t.size_y[l] = Index<Acc>(t.active[l] ? max(y.size(), 0) : 0);
      t.first_x[l] = Index<Acc>(x.first), t.size_x[l] = Index<Acc>(max(x.size(), 0));
      if (!t.active[l]) continue;
      y0 = min(y0, y.first), y1 = max(y1, y.end), x0 = min(x0, x.first), x1 = max(x1, x.end);
    }
    if (!near) return;
    t.from[v] = y1 > y0 ? (y0 - t.box.y) * t.box.w + (x0 - t.box.x) : 0;
    t.to[v] = y1 > y0 ? (y1 - 1 - t.box.y) * t.box.w + (x1 - t.box.x) : 0;
  }

  static Spread spread(const Index<Acc>* index) {
    bool uniform = true, consecutive = true;
    for (int i = 1; i < W; ++i) {
      uniform &= index[i] == index[0];
      consecutive &= index[i] == index[0] + i;
    }
    return uniform ? Spread::kUniform : consecutive ? Spread::kConsecutive : Spread::kAny;
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
