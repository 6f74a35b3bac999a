// The engine's one inner product: C[i][lane] (+)= sum_k A[i][k] * B[k][lane].
//
// B and C are panels whose rows are kVectors vectors wide: a lane is a position of the resident tile. A comes from the
// walked block, element by element, by two strides. Scores and weighted sums are the same product:
//
//     scores   S[r][lane]  = sum_d  walked[r][d] * resident[d][lane]       A strides (position, channel)
//     sums     O[c][lane] += sum_r  walked[r][c] * weight[r][lane]         A strides (channel, position)
//
// A register tile is rows_of(vectors) x vectors accumulators. Sums start at zero and are added to C once, so that an
// element's chain of roundings is as long as a block, not as the whole walk.
#pragma once

#include "simd.h"

namespace visattn::cpu::VISATTN_ISA {

// Plain arithmetic: elements are Acc, one multiply-add at a time.
template <class T>
struct Plain {
  using Acc = T;
  using Elem = T;
  static constexpr int kPair = 1;

  static VISATTN_INLINE Vec<Acc> madd(Elem a, Vec<Elem> b, Vec<Acc> c) { return c + a * b; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 multiplied and added into float32 by one instruction; an element holds (2k, 2k + 1).
struct Pairs {
  using Acc = float;
  using Elem = uint32_t;
  static constexpr int kPair = 2;

  static VISATTN_INLINE Vec<Acc> madd(Elem a, Vec<Elem> b, Vec<Acc> c) {
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

template <class M>
constexpr int kTile = kVectors * kLanes<typename M::Acc>;  // lanes of a panel row

struct Strides {
  int64_t row, k;
};

// Rows of a register tile so many vectors wide: enough accumulators to hide the latency of a multiply-add.
constexpr int rows_of(int vectors) {
#if defined(__AVX512F__)
  return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
#elif defined(__AVX2__)
  return vectors == 2 ? 6 : 10;
#else
  return vectors == 2 ? 4 : 8;
#endif
}

template <class M, int R, int NV, bool kAdd>
VISATTN_INLINE void register_tile(const typename M::Elem* a, Strides s, int64_t nk, const typename M::Elem* b,
                                  int64_t ldb, typename M::Acc* c, int64_t ldc, typename M::Acc factor) {
  using Acc = typename M::Acc;
  constexpr int W = kLanes<Acc>;
  Vec<Acc> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec<Acc>{};
  for (int64_t k = 0; k < nk; ++k) {
    Vec<typename M::Elem> row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename M::Elem x = a[r * s.row + k * s.k];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = M::madd(x, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      Acc* p = c + r * ldc + v * W;
      if constexpr (kAdd)
        store(p, load(p) + acc[r][v]);
      else
        store(p, acc[r][v] * factor);
    }
}

template <class M, int NV, bool kAdd, int R>
VISATTN_INLINE void some_rows(int64_t rows, const typename M::Elem* a, Strides s, int64_t nk, const typename M::Elem* b,
                              int64_t ldb, typename M::Acc* c, int64_t ldc, typename M::Acc factor) {
  if constexpr (R > 0) {
    if (rows == R)
      register_tile<M, R, NV, kAdd>(a, s, nk, b, ldb, c, ldc, factor);
    else
      some_rows<M, NV, kAdd, R - 1>(rows, a, s, nk, b, ldb, c, ldc, factor);
  }
}

template <class M, int NV, bool kAdd>
__attribute__((noinline)) void product_rows(const typename M::Elem* a, Strides s, int64_t rows, int64_t nk,
                                            const typename M::Elem* b, int64_t ldb, typename M::Acc* c, int64_t ldc,
                                            typename M::Acc factor) {
  constexpr int R = rows_of(NV);
  // Tiles of equal height, one more or less: two of 4 rows are faster than one of 6 and a thin one.
  for (int64_t tiles = (rows + R - 1) / R, i = 0; tiles > 0; --tiles) {
    const int64_t count = (rows - i + tiles - 1) / tiles;
    some_rows<M, NV, kAdd, R>(count, a + i * s.row, s, nk, b, ldb, c + i * ldc, ldc, factor);
    i += count;
  }
}

// C = factor * A B, or C += A B, on the first `vectors` vectors of each row. Rows of B and C are ldb and ldc apart.
template <class M, bool kAdd, int NV = kVectors>
VISATTN_INLINE void product(int vectors, const typename M::Elem* a, Strides s, int64_t rows, int64_t nk,
                            const typename M::Elem* b, typename M::Acc* c, typename M::Acc factor,
                            int64_t ldb = kTile<M>, int64_t ldc = kTile<M>) {
  if constexpr (NV > 0) {
    if (vectors == NV)
      product_rows<M, NV, kAdd>(a, s, rows, nk, b, ldb, c, ldc, factor);
    else
      product<M, kAdd, NV - 1>(vectors, a, s, rows, nk, b, c, factor, ldb, ldc);
  }
}

// The same for rows of any width, kVectors vectors at a time.
template <class M, bool kAdd>
void wide_product(int64_t columns, const typename M::Elem* a, Strides s, int64_t rows, int64_t nk,
                  const typename M::Elem* b, int64_t ldb, typename M::Acc* c, int64_t ldc, typename M::Acc factor) {
  constexpr int W = kLanes<typename M::Acc>;
  for (int64_t i = 0; i < columns; i += kTile<M>) {
    const int64_t vectors = (columns - i + W - 1) / W;
    product<M, kAdd>(int(vectors < kVectors ? vectors : kVectors), a, s, rows, nk, b + i, c + i, factor, ldb, ldc);
  }
}

}  // namespace visattn::cpu::VISATTN_ISA
