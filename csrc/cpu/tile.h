// What all passes share: how a pass is cut into items, and the resident side of an item.
//
// An item holds a tile of positions in the lanes of vectors (queries in the forward and in the gradient of q, keys in
// the gradients of k and v) and walks the positions of the other side in blocks. Sums, maxima and factors of a lane are
// then elementwise operations on vectors: no horizontal step, no transposed copy of the walked side, and no padding of
// D or Dv to a vector's width. A tile has up to kPanels panels of kTile lanes, so that a staged block serves several.
#pragma once

#include "stage.h"

namespace visattn::cpu::VISATTN_ISA {

constexpr int kPanels = 4;

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

constexpr double kLog2E = 1.44269504088896340735992468100;
constexpr double kLn2 = 0.693147180559945309417232121458;

// How many panels a tile has: as many as leave every thread a few items to balance with.
template <class M>
int tile_panels(int64_t positions, int64_t others, int threads) {
  const int64_t panels = ceil_div(positions, kTile<M>);
  const int64_t wanted = 4 * int64_t(threads);
  for (int n = kPanels; n > 1; --n)
    if (ceil_div(panels, n) * others >= wanted) return n;
  return 1;
}

// The positions of one tile, with offsets into one tensor.
struct Tile {
  int64_t first, count;
};

template <class M>
struct Tiling {
  int panels;
  int64_t positions, tiles;

  Tiling(int64_t positions, int64_t others, int threads)
      : panels(tile_panels<M>(positions, others, threads)),
        positions(positions),
        tiles(ceil_div(positions, panels * kTile<M>)) {}

  Tile operator[](int64_t i) const {
    const int64_t size = panels * kTile<M>;
    return {i * size, min(size, positions - i * size)};
  }
};

constexpr Box whole(const Grid& grid) { return {0, 0, grid.h, grid.w}; }

// Offsets of queries `first` and following: positions of the grid, or points.
VISATTN_INLINE void query_offsets(const Call& call, const Map& map, const Box& box, int64_t first, int64_t n,
                                  int64_t* out) {
  if (!call.points) return offsets(map, box, first, n, out);
  for (int64_t i = 0; i < n; ++i)
    out[i] = call.points[2 * (first + i)] * map.y + call.points[2 * (first + i) + 1] * map.x;
}

// Where the statistics of the queries lie: as the queries do, and those of points in a row.
VISATTN_INLINE Box statistics_box(const Call& call) {
  return call.points ? Box{0, 0, 1, call.n_points} : whole(call.problem.queries);
}

// Lanes of panel `t` of a tile of `count` positions.
template <class M>
VISATTN_INLINE int64_t panel_lanes(int64_t count, int t) {
  return min(int64_t(kTile<M>), count - t * kTile<M>);
}

template <class M>
VISATTN_INLINE int panel_vectors(int64_t lanes) {
  return int(ceil_div(lanes, kLanes<typename M::Acc>));
}

template <class T>
VISATTN_INLINE const T* at(const Map& map, int64_t b, int64_t h) {
  return (const T*)map.data + map.at(b, h);
}

template <class T>
VISATTN_INLINE T* at_mutable(const Map& map, int64_t b, int64_t h) {
  return (T*)map.data + map.at(b, h);
}

}  // namespace visattn::cpu::VISATTN_ISA
