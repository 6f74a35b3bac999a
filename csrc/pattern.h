// Patterns: which keys a query sees, as plain integers. Host and device; no torch.
//
// The integers arrive from visattn_kernels/patterns.py (PATTERN_FIELDS, PATTERN_KINDS) in this order.
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

struct Pattern {
  PatternKind kind;
  int64_t size_h, size_w;      // kernel, window, grid size or span
  int64_t step_h, step_w;      // dilation
  int64_t shift_h, shift_w;    // offset of the window grid
  int64_t border;              // what lies outside the map
  int64_t causal_h, causal_w;  // whether the keys end at the query
};

constexpr int kPatternFields = 10;

struct Grid {
  int64_t h, w;

  VISATTN_HD int64_t size() const { return h * w; }
};

// A rectangle of positions of a grid, walked in raster order.
struct Box {
  int64_t y, x, h, w;

  VISATTN_HD int64_t size() const { return h * w; }
};

// The keys that a tile of queries attends, and by symmetry the queries that a tile of keys is attended from.
VISATTN_HD Box attended_box(const Pattern&, const Grid& other) { return {0, 0, other.h, other.w}; }

}  // namespace visattn
