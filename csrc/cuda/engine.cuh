// What the CUDA kernels share: a block's tile, loads into shared memory, products of 16 rows of a warp.
//
// A block owns 64 positions of one grid, the *near* side (queries in the forward and for dQ, keys for dK and dV), of
// one map and head; each of its four warps owns 16 of them, the rows of its matrices. The positions of the other grid
// that they meet, the *far* side, are a box, walked in raster order, kFar *slots* at a time:
//
//        far side, slots of a stage            stages 0 and 1 in turn: one is loaded (cp.async)
//       ┌──────────────────────────┐           while the other is used
//   16  │ warp 0: scores 16 × kFar │
//   16  │ warp 1                   │           scores lie in registers as mma.sync leaves them:
//   16  │ warp 2                   │           a lane has rows g and g + 8 (g = lane / 4) and
//   16  │ warp 3                   │           columns 2 (lane % 4) and the next of every eight
//       └──────────────────────────┘
//
// Near positions see the same keys in most patterns and are then taken 64 at a time in raster order (`packed`); for
// neighbourhoods and spans a warp owns a box of 2×8 or a line of 16, and groups of 16 slots none of whose rows lies
// in reach of the warp are skipped.
//
// A pair that the pattern does not have, or whose key was removed, is *absent*: its score is -inf, and its weight or
// gradient -0.0, which a present pair never has. Products treat that as zero; where a result is not finite, it is
// computed anew with absent pairs left out (`careful`), so that a NaN reaches only what it reaches in the formula.
#pragma once

#include <type_traits>

#include "../problem.h"
#include "plan.h"
#include "prims.h"

namespace visattn::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kAbsent = -0.0f;

VISATTN_DEVICE bool absent(float x) { return as_bits(x) == 0x80000000u; }
VISATTN_DEVICE bool finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }

struct Tf32 {};  // float32 by TF32 products

// A dtype: how it lies in memory, and how many of it a step of a product takes.
template <class E>
struct Element {
  using T = E;
  static constexpr int kStep = 16;
};
template <>
struct Element<float> {
  using T = float;
  static constexpr int kStep = 8;
};
template <>
struct Element<Tf32> : Element<float> {};

template <class Element_, int kD_, int kDv_, Kind kKind_>
struct Cell {
  using E = Element_;
  using T = typename Element<E>::T;
  static constexpr int kStep = Element<E>::kStep, kVector = 16 / int(sizeof(T));
  static constexpr int kD = kD_, kDv = kDv_;
  static constexpr int kLd = kD + kVector, kLdv = kDv + kVector;  // of rows in shared memory
  static constexpr Kind kKind = kKind_;
  static constexpr bool kMasked = kKind != Kind::kPlain;
  static constexpr bool kBias = kKind >= Kind::kBias;
  static constexpr bool kVectors = kKind == Kind::kVectors;
  // Scores of float32 stay in natural units, so that nothing is rounded before the maximum is taken off.
  static constexpr bool kNatural = sizeof(T) == 4;
  static constexpr float kUnit = kNatural ? 1.0f : kLog2E;
};

// Slots of a stage.
template <class C, Pass kPass>
constexpr int kFar = slots_of(int(sizeof(typename C::T)), C::kD, C::kDv, kPass);

// A tile: what block() and the turn in its deal name.
struct Tile {
  int64_t batch;
  Part part;
  Region region;
  Box own, far;
  int64_t first;  // packed: index of the first position in the region
  int count;      // slots
};

template <class T>
VISATTN_DEVICE T* shared(int offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

VISATTN_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
VISATTN_DEVICE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// The tile of an item; empty if it lies past its region's end.
template <bool kOfKeys>
VISATTN_DEVICE Tile tile_of(const Args& args, int64_t item) {
  const Problem& p = args.call.problem;
  const Plan& plan = args.plan;
  Tile t;
  t.batch = item / plan.tiles;
  const int64_t tile = item % plan.tiles, blocks = plan.blocks_y * plan.blocks_x, block = tile % blocks;
  t.part = part_of(p.pattern, args.call.part, p.queries, p.keys);
  t.region = region_of(t.part, tile / blocks);
  t.count = 0, t.own = t.far = {};
  t.first = block * kNear;
  const Grid grid = kOfKeys ? t.region.keys() : t.region.queries();
  if (plan.packed) {
    if (t.first >= grid.size()) return t;
    const int64_t last = least(t.first + kNear, grid.size()) - 1, y = t.first / grid.w, h = last / grid.w - y + 1;
    t.own = {y, h == 1 ? t.first % grid.w : 0, h, h == 1 ? last - t.first + 1 : grid.w};
  } else {
    const int64_t h = plan.warp_h * (plan.warp_h == 1 ? 1 : kWarps), w = kNear / h;
    const int64_t y = block / plan.blocks_x * h, x = block % plan.blocks_x * w;
    if (y >= grid.h || x >= grid.w) return t;
    t.own = {y, x, least(h, grid.h - y), least(w, grid.w - x)};
  }
  t.far = kOfKeys ? queries_of(t.part, t.region, t.own) : keys_of(t.part, t.region, t.own);
  t.count = t.far.h > 0 && t.far.w > 0 ? int(t.far.size()) : 0;
  return t;
}

// The near position of a row of the block; nowhere if it is none.
template <bool kOfKeys>
VISATTN_DEVICE Place place_of(const Plan& plan, const Tile& t, int row) {
  const Grid grid = kOfKeys ? t.region.keys() : t.region.queries();
  if (plan.packed) {
    const int64_t i = t.first + row;
    return i < grid.size() ? Place{int(i / grid.w), int(i % grid.w)} : Place{kNowhere, 0};
  }
  const int warp = row / 16, i = row % 16;
  const int64_t y = t.own.y + (plan.warp_h == 1 ? 0 : warp * plan.warp_h) + i / plan.warp_w;
  const int64_t x = t.own.x + (plan.warp_h == 1 ? 16 * warp : 0) + i % plan.warp_w;
  return y < grid.h && x < grid.w ? Place{int(y), int(x)} : Place{kNowhere, 0};
}

template <bool kQueries>
VISATTN_DEVICE int64_t offset_of(const Region& region, const Map& m, Place p) {
  return kQueries ? region.query_y.at(p.y) * m.y + region.query_x.at(p.x) * m.x
                  : region.key_y.at(p.y) * m.y + region.key_x.at(p.x) * m.x;
}

// A row of kWidth numbers into shared memory, by kPerRow threads, of which this is the one numbered `part`.
template <class T, int kWidth, int kPerRow>
VISATTN_DEVICE void load_row(T* to, const T* from, int64_t channel, bool present, bool vector, int part) {
  constexpr int kVector = 16 / int(sizeof(T));
  if (vector) {
#pragma unroll
    for (int c = 0; c < kWidth; c += kPerRow * kVector) {
      const int at = c + part * kVector;
      if (kWidth % (kPerRow * kVector) == 0 || at < kWidth) copy_async(to + at, from + at, present);
    }
  } else {
    for (int c = part; c < kWidth; c += kPerRow) to[c] = present ? from[c * channel] : T{};
  }
}

// Rows of near positions [kNear][kWidth] of one map and head; those of no position are zero.
template <class T, int kWidth, bool kQueries>
VISATTN_DEVICE void load_near(T* to, const Map& m, int64_t head, const Tile& t, const Place* places, bool vector) {
  constexpr int kPerRow = kThreads / kNear;
  const int row = thread() / kPerRow;
  const Place place = places[row];
  const bool present = place.y != kNowhere;
  const T* base = static_cast<const T*>(m.data) + m.at(t.batch, head);
  load_row<T, kWidth, kPerRow>(to + row * (kWidth + 16 / int(sizeof(T))),
                               present ? base + offset_of<kQueries>(t.region, m, place) : base, m.channel, present,
                               vector, thread() % kPerRow);
}

// scores[16][kColumns] += rows of the warp [16][kWidth] · rows of slots [kColumns][kWidth]ᵀ, in groups of 16 columns
// that `live` has.
template <class C, int kWidth, int kColumns>
VISATTN_DEVICE void multiply_rows(float (&scores)[kColumns / 8][4], const typename C::T* near, const typename C::T* far,
                                  uint32_t live) {
  constexpr int kLd = kWidth + C::kVector;
  const int l = lane();
  near += (l & 15) * kLd + (l >> 4) * C::kVector;
  far += ((l & 7) + (l >> 4) * 8) * kLd + (l >> 3 & 1) * C::kVector;
#pragma unroll
  for (int k = 0; k < kWidth; k += C::kStep) {
    uint32_t a[4], b[4];
    ldmatrix(a, near + k);
    if constexpr (std::is_same_v<typename C::E, Tf32>)
      for (uint32_t& x : a) x = to_tf32(as_float(x));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      if (!(live >> j & 1)) continue;
      ldmatrix(b, far + 16 * j * kLd + k);
      if constexpr (std::is_same_v<typename C::E, float>) {
        mma_fp32(scores[2 * j], a, b[0], b[1]);
        mma_fp32(scores[2 * j + 1], a, b[2], b[3]);
      } else if constexpr (std::is_same_v<typename C::E, Tf32>) {
        for (uint32_t& x : b) x = to_tf32(as_float(x));
        mma_tf32(scores[2 * j], a, b[0], b[1]);
        mma_tf32(scores[2 * j + 1], a, b[2], b[3]);
      } else if constexpr (kWidth < C::kStep) {
        mma_k8<typename C::E>(scores[2 * j], a[0], a[1], b[0]);
        mma_k8<typename C::E>(scores[2 * j + 1], a[0], a[1], b[2]);
      } else {
        mma_k16<typename C::E>(scores[2 * j], a, b[0], b[1]);
        mma_k16<typename C::E>(scores[2 * j + 1], a, b[2], b[3]);
      }
    }
  }
}

// sums[16][kWidth] += a[16][kStep] · rows [kStep][kWidth]. For 4-byte numbers the columns of `a` are those of eight
// scores, as they lie: k runs over 0, 2, 4, 6, 1, 3, 5, 7.
template <class C, int kWidth>
VISATTN_DEVICE void multiply_step(float (&sums)[kWidth / 8][4], const uint32_t (&a)[4], const typename C::T* rows) {
  constexpr int kLd = kWidth + C::kVector;
  const int l = lane();
  if constexpr (sizeof(typename C::T) == 4) {
    const float* column = rows + 2 * (l & 3) * kLd + (l >> 2);
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      const float first = column[8 * n], second = column[kLd + 8 * n];
      if constexpr (std::is_same_v<typename C::E, float>)
        mma_fp32(sums[n], a, as_bits(first), as_bits(second));
      else
        mma_tf32(sums[n], a, to_tf32(first), to_tf32(second));
    }
  } else {
    const auto* row = rows + (l & 15) * kLd + (l >> 4) * 8;
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, row + 8 * n);
      mma_k16<typename C::E>(sums[n], a, b[0], b[1]);
      if (n + 1 < kWidth / 8) mma_k16<typename C::E>(sums[n + 1], a, b[2], b[3]);
    }
  }
}

// Four numbers (rows g and g + 8 of two columns) and, in 16 bits, four of the next eight columns, as operand a.
template <class C>
VISATTN_DEVICE void operand(uint32_t (&a)[4], const float (&x)[4], const float (&next)[4]) {
  if constexpr (std::is_same_v<typename C::E, float>) {
    for (int i = 0; i < 4; ++i) a[i] = as_bits(x[(i & 1) * 2 + (i >> 1)]);
  } else if constexpr (std::is_same_v<typename C::E, Tf32>) {
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(x[(i & 1) * 2 + (i >> 1)]);
  } else {
    for (int i = 0; i < 2; ++i) {
      a[i] = pack<typename C::E>(x[2 * i], x[2 * i + 1]);
      a[2 + i] = pack<typename C::E>(next[2 * i], next[2 * i + 1]);
    }
  }
}

// sums[16][kWidth] += weights[16][kColumns] · rows of slots [kColumns][kWidth].
template <class C, int kWidth, int kColumns>
VISATTN_DEVICE void multiply_columns(float (&sums)[kWidth / 8][4], const float (&weights)[kColumns / 8][4],
                                     const typename C::T* rows, uint32_t live) {
  constexpr int kLd = kWidth + C::kVector, kChunks = C::kStep / 8;
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += kChunks) {
    if (!(live >> (j / 2) & 1)) continue;
    uint32_t a[4];
    operand<C>(a, weights[j], weights[j + kChunks - 1]);
    multiply_step<C, kWidth>(sums, a, rows + 8 * j * kLd);
  }
}

// As `multiply_columns`, one number after the other, leaving absent pairs out. Rare, so that it need not be fast.
template <class C, int kWidth, int kColumns>
VISATTN_DEVICE void multiply_carefully(float (&sums)[kWidth / 8][4], const float (&weights)[kColumns / 8][4],
                                       const typename C::T* rows, uint32_t live) {
  constexpr int kLd = kWidth + C::kVector;
  const int l = lane(), own = 2 * (l & 3);
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    if (!(live >> (j / 2) & 1)) continue;
#pragma unroll 1
    for (int column = 0; column < 8; ++column) {
      float weight[2];
      for (int r = 0; r < 2; ++r)
        weight[r] = shuffle(column & 1 ? weights[j][2 * r + 1] : weights[j][2 * r], (l & ~3) | column >> 1);
      const auto* const row = rows + (8 * j + column) * kLd + own;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
        for (int i = 0; i < 4; ++i)
          if (!absent(weight[i >> 1])) sums[n][i] += weight[i >> 1] * to_float(row[8 * n + (i & 1)]);
    }
  }
}

// One row's numbers of a lane to memory: two neighbours of every eight.
template <class C, int kWidth>
VISATTN_DEVICE void store_row(void* data, int64_t offset, bool wide, const float (&x)[kWidth / 8][4], int r,
                              float factor) {
  const int own = 2 * (lane() & 3);
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
    const float first = x[n][2 * r] * factor, second = x[n][2 * r + 1] * factor;
    const int64_t at = offset + 8 * n + own;
    if constexpr (sizeof(typename C::T) == 2) {
      if (!wide) {
        *reinterpret_cast<uint32_t*>(static_cast<typename C::T*>(data) + at) = pack<typename C::E>(first, second);
        continue;
      }
    }
    float* to = static_cast<float*>(data) + at;
    to[0] = first, to[1] = second;
  }
}

template <int kWidth>
VISATTN_DEVICE void load_sums(float (&x)[kWidth / 8][4], const void* data, int64_t offset, int r) {
  const float* from = static_cast<const float*>(data) + offset + 2 * (lane() & 3);
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n)
    for (int i = 0; i < 2; ++i) x[n][2 * r + i] = from[8 * n + i];
}

template <int kChunks>
VISATTN_DEVICE bool any_not_finite(const float (&x)[kChunks][4]) {
  bool bad = false;
#pragma unroll
  for (int n = 0; n < kChunks; ++n)
    for (int i = 0; i < 4; ++i) bad = bad || !finite(x[n][i]);
  return bad;
}

VISATTN_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

VISATTN_DEVICE float quad_max(float x) {
  x = __builtin_fmaxf(x, shuffle_xor(x, 1));
  return __builtin_fmaxf(x, shuffle_xor(x, 2));
}

}  // namespace visattn::cuda
