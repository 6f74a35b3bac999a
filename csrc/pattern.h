// Patterns: which keys a query sees, as plain integers. Host and device; no torch.
//
// The integers arrive from visattn_kernels/patterns.py (PATTERN_FIELDS, PATTERN_KINDS) in this order.
//
// Every pattern is one or two *parts* that share no pair, and every part is a product of two one-axis rules. An axis is
// cut into *classes*: each class is a line of evenly spaced positions of the query grid, which see nothing but one line
// of the key grid. Counted along these lines, a query's keys are a range, and so are a key's queries:
//
//     axis        classes                        keys of the query with index i
//     whole       one                            all
//     cells       runs between cuts              all of the cell
//     strided     residues modulo the stride     all of the class
//     near        residues modulo the dilation   [i - K / 2, i - K / 2 + K), pushed inside, clipped or not
//
// A kernel walks, for a box of queries of one pair of classes, the box of keys that `keys_of` gives (or for a box of
// keys the box of queries that `queries_of` gives), with `member` for the pairs near the edges. Offsets, in units of
// the pattern's stride, are differences of indices.
#pragma once

#include <cstdint>

// Functions of these headers are always inlined: they are compiled for several instruction sets into one library, and a
// copy with the wrong instructions must not be the one the linker keeps.
#if defined(__CUDACC__)
#define VISATTN_HD __host__ __device__ __forceinline__
#else
#define VISATTN_HD inline __attribute__((always_inline))
#endif

namespace visattn {

enum class PatternKind : int64_t { kGlobal, kWindow, kGrid, kNeighborhood, kRow, kColumn, kCrissCross };
enum class Border : int64_t { kShift, kMask, kZero };

struct Pattern {
  PatternKind kind;
  int64_t size_h, size_w;      // kernel, window, grid size or span (0: all)
  int64_t step_h, step_w;      // dilation
  int64_t shift_h, shift_w;    // offset of the window grid
  int64_t border;              // what lies outside the map, a Border
  int64_t causal_h, causal_w;  // whether the keys end at the query
};

constexpr int kPatternFields = 10;

struct Grid {
  int64_t h, w;

  VISATTN_HD int64_t size() const { return h * w; }
};

// A rectangle of positions or indices, walked in raster order.
struct Box {
  int64_t y, x, h, w;

  VISATTN_HD int64_t size() const { return h * w; }
};

// Indices [first, end).
struct Range {
  int64_t first, end;

  VISATTN_HD int64_t size() const { return end - first; }
  VISATTN_HD bool contains(int64_t i) const { return first <= i && i < end; }
};

// Evenly spaced positions of an axis; index i stands for position start + i * step.
struct Line {
  int64_t start, step, count;

  VISATTN_HD int64_t at(int64_t i) const { return start + i * step; }
};

enum class AxisKind { kWhole, kCells, kStrided, kNear };

// One axis of a part.
struct Axis {
  AxisKind kind;
  int64_t queries, keys;  // lengths; equal unless the kind is kWhole
  int64_t size = 1;       // width of a cell, or kernel
  int64_t step = 1;       // stride or dilation
  int64_t shift = 0;      // first cut between cells
  Border border = Border::kMask;
  bool causal = false;

  static VISATTN_HD int64_t floor_zero(int64_t i) { return i > 0 ? i : 0; }
  static VISATTN_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  VISATTN_HD bool near() const { return kind == AxisKind::kNear; }

  VISATTN_HD int64_t classes() const {
    switch (kind) {
      case AxisKind::kWhole:
        return 1;
      case AxisKind::kCells:
        return (shift > 0) + (floor_zero(queries - shift) + size - 1) / size;
      default:
        return least(step, queries);
    }
  }

  VISATTN_HD int64_t class_of(int64_t position) const {
    switch (kind) {
      case AxisKind::kWhole:
        return 0;
      case AxisKind::kCells:
        return position < shift ? 0 : (shift > 0) + (position - shift) / size;
      default:
        return position % step;
    }
  }

  VISATTN_HD int64_t index_of(int64_t position) const {
    switch (kind) {
      case AxisKind::kWhole:
        return position;
      case AxisKind::kCells:
        return position - line(class_of(position), queries).start;
      default:
        return position / step;
    }
  }

  // The positions of a class on an axis of the given length.
  VISATTN_HD Line line(int64_t c, int64_t length) const {
    switch (kind) {
      case AxisKind::kWhole:
        return {0, 1, length};
      case AxisKind::kCells: {
        const int64_t end = least(shift > 0 ? shift + c * size : (c + 1) * size, length);
        const int64_t start = c == 0 ? 0 : (shift > 0 ? shift + (c - 1) * size : c * size);
        return {start, 1, end - start};
      }
      default:
        return {c, step, (length - c + step - 1) / step};
    }
  }

  VISATTN_HD Line query_line(int64_t c) const { return line(c, queries); }
  VISATTN_HD Line key_line(int64_t c) const { return line(c, keys); }

  // The longest class of an axis of the given length, or a little more.
  VISATTN_HD int64_t longest(int64_t length) const {
    switch (kind) {
      case AxisKind::kWhole:
        return length;
      case AxisKind::kCells:
        return least(size, length);
      default:
        return (length + step - 1) / step;
    }
  }

  // Indices of the keys that the query of index i sees, in a class of n. With border zero they may lie outside [0, n).
  VISATTN_HD Range keys_of(int64_t i, int64_t n) const {
    if (!near()) return {0, n};
    const int64_t first = causal ? i - size + 1 : i - size / 2;
    if (border == Border::kZero) return {first, first + size};
    if (border == Border::kShift && !causal) {
      const int64_t start = least(floor_zero(first), floor_zero(n - size));
      return {start, least(start + size, n)};
    }
    return {floor_zero(first), least(first + size, n)};
  }

  // Indices of the queries that see the key of index j, 0 <= j < n.
  VISATTN_HD Range queries_of(int64_t j, int64_t n) const {
    if (!near()) return {0, n};
    const int64_t ahead = causal ? size - 1 : size / 2;  // the last query is so far after the key
    Range range{floor_zero(j + ahead - size + 1), least(j + ahead + 1, n)};
    if (border == Border::kShift && !causal) {
      if (j < size) range.first = 0;
      if (j >= n - size) range.end = n;
    }
    return range;
  }
};

VISATTN_HD int parts(const Pattern& p) { return p.kind == PatternKind::kCrissCross ? 2 : 1; }

// One axis (0: height, 1: width) of a part of a pattern.
VISATTN_HD Axis axis_of(const Pattern& p, int part, int axis, int64_t queries, int64_t keys) {
  const int64_t size = axis ? p.size_w : p.size_h;
  Axis a{AxisKind::kWhole, queries, keys};
  switch (p.kind) {
    case PatternKind::kGlobal:
      return a;
    case PatternKind::kWindow:
      a.kind = AxisKind::kCells, a.size = size, a.shift = axis ? p.shift_w : p.shift_h;
      return a;
    case PatternKind::kGrid:
      a.kind = AxisKind::kStrided, a.step = (queries + size - 1) / size;
      return a;
    case PatternKind::kNeighborhood:
      a.kind = AxisKind::kNear, a.size = size, a.step = axis ? p.step_w : p.step_h;
      a.border = Border(p.border), a.causal = (axis ? p.causal_w : p.causal_h) != 0;
      return a;
    default: {  // rows and columns: own position across, all or a span along
      const bool row = p.kind == PatternKind::kRow || (p.kind == PatternKind::kCrissCross && part == 0);
      if (row != (axis == 1))
        a.kind = AxisKind::kCells;
      else if (size > 0)
        a.kind = AxisKind::kNear, a.size = size;
      return a;
    }
  }
}

// K, the pattern's reach along an axis: relative tables have 2K - 1 entries.
VISATTN_HD int64_t reach_of(const Pattern& p, int axis, int64_t length) {
  const int64_t size = axis ? p.size_w : p.size_h;
  switch (p.kind) {
    case PatternKind::kGlobal:
    case PatternKind::kCrissCross:
      return length;
    case PatternKind::kRow:
    case PatternKind::kColumn:
      if ((p.kind == PatternKind::kRow) != (axis == 1)) return 1;
      return size > 0 ? size : length;
    default:
      return size;
  }
}

// A part of a pattern on two grids.
struct Part {
  Axis y, x;
  bool others;  // every pair but that of a query with the key of its own position

  VISATTN_HD bool near() const { return y.near() || x.near(); }
  VISATTN_HD int64_t classes() const { return y.classes() * x.classes(); }

  VISATTN_HD bool member(int64_t query_y, int64_t query_x, int64_t key_y, int64_t key_x, int64_t n_y,
                         int64_t n_x) const {
    return y.keys_of(query_y, n_y).contains(key_y) && x.keys_of(query_x, n_x).contains(key_x) &&
           !(others && query_y == key_y && query_x == key_x);
  }
};

VISATTN_HD Part part_of(const Pattern& p, int part, const Grid& queries, const Grid& keys) {
  return {axis_of(p, part, 0, queries.h, keys.h), axis_of(p, part, 1, queries.w, keys.w), part == 1};
}

// A pair of classes: a sub-grid of queries and the sub-grid of keys that they see.
struct Region {
  Line query_y, query_x, key_y, key_x;

  VISATTN_HD Grid queries() const { return {query_y.count, query_x.count}; }
  VISATTN_HD Grid keys() const { return {key_y.count, key_x.count}; }
};

VISATTN_HD Region region_of(const Part& part, int64_t c) {
  const int64_t width = part.x.classes(), cy = c / width, cx = c % width;
  return {part.y.query_line(cy), part.x.query_line(cx), part.y.key_line(cy), part.x.key_line(cx)};
}

// The box of keys, by indices, of a box of queries of a region; and the box of queries of a box of keys. Ranges move
// with the index, never back, so that the first and the last index decide.
VISATTN_HD Box keys_of(const Part& part, const Region& region, const Box& queries) {
  const int64_t n_y = region.key_y.count, n_x = region.key_x.count;
  const int64_t y = part.y.keys_of(queries.y, n_y).first, x = part.x.keys_of(queries.x, n_x).first;
  return {y, x, part.y.keys_of(queries.y + queries.h - 1, n_y).end - y,
          part.x.keys_of(queries.x + queries.w - 1, n_x).end - x};
}

VISATTN_HD Box queries_of(const Part& part, const Region& region, const Box& keys) {
  const int64_t n_y = region.query_y.count, n_x = region.query_x.count;
  const int64_t y = part.y.queries_of(keys.y, n_y).first, x = part.x.queries_of(keys.x, n_x).first;
  return {y, x, part.y.queries_of(keys.y + keys.h - 1, n_y).end - y,
          part.x.queries_of(keys.x + keys.w - 1, n_x).end - x};
}

}  // namespace visattn
