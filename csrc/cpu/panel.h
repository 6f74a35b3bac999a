// Panels: the resident positions in the lanes of vectors, and sums over walked blocks.
//
// A panel is [channel (or pair)][lane], kTile lanes wide. Its positions are read, and results written, vector by
// vector, wherever they lie: channels innermost go through a transposition in registers.
#pragma once

#include "stage.h"

namespace visattn::cpu::VISATTN_ISA {

// The most panels of a tile: 256 lanes of 64-byte vectors, 128 or 64 of narrower ones.
constexpr int kPanels = kVectorBytes == 64 ? 4 : 8;

// The first n elements (at least 1, at most a vector) at p, widened; zeros after them.
template <class Acc, class T>
VISATTN_INLINE Vec<Acc> load_some(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    const __mmask16 mask = __mmask16(n >= 16 ? 0xffff : (1 << n) - 1);
    if constexpr (__is_same(T, float))
      return (VecF)_mm512_maskz_loadu_ps(mask, p);
    else if constexpr (__is_same(T, bf16))
      return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
    else
      return (VecF)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  }
#elif defined(__AVX2__)
  if constexpr (__is_same(T, float)) return n >= 8 ? load(p) : (VecF)_mm256_maskload_ps(p, first_lanes(n));
  if constexpr (__is_same(T, bf16)) {
    if (n >= 8) return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
  }
#endif
  Vec<Acc> x{};
  if constexpr (__is_same(T, Acc)) {
    if (n >= kLanes<Acc>) return load(p);
  }
  for (int64_t i = 0; i < n && i < kLanes<Acc>; ++i) x[i] = widen(p[i]);
  return x;
}

// Write the first n lanes (or all) to p, rounded to its type.
template <class T, class V>
VISATTN_INLINE void store_some(T* p, V x, int64_t n) {
  using Acc = decltype(x[0] + x[0]);
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    const __mmask16 mask = __mmask16(n >= 16 ? 0xffff : (1 << n) - 1);
    if constexpr (__is_same(T, float)) {
      _mm512_mask_storeu_ps(p, mask, (__m512)x);
      return;
    } else if constexpr (__is_same(T, f16)) {
      _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      return;
    } else {
#if defined(__AVX512BF16__)
      _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh((__m512)x));
      return;
#endif
    }
  }
#elif defined(__AVX2__)
  if constexpr (__is_same(T, float)) {
    if (n < 8) {
      _mm256_maskstore_ps(p, first_lanes(n), (__m256)x);
      return;
    }
  }
#endif
  if constexpr (__is_same(T, Acc)) {
    if (n >= kLanes<Acc>) return store(p, x);
  }
  for (int64_t i = 0; i < n && i < kLanes<Acc>; ++i) narrow(x[i], p + i);
}

template <class M>
int64_t panel_elements(int64_t channels) {
  return ceil_div(channels, M::kPair) * kTile<M>;
}

// Whether the lanes that are somewhere come first and lie side by side; their number in *n.
VISATTN_INLINE bool adjacent_lanes(const int64_t* offset, int lanes, int64_t* n) {
  *n = 0;
  while (*n < lanes && offset[*n] != kNowhere) ++*n;
  for (int64_t i = 1; i < *n; ++i)
    if (offset[i] - offset[i - 1] != 1) return false;
  for (int64_t i = *n; i < lanes; ++i)
    if (offset[i] != kNowhere) return false;
  return *n > 0;
}

// Pack one vector's positions into a panel; lanes that are nowhere get zeros. Nothing is scaled here: the product
// applies its factor, so that a score has the same bits whichever side is resident.
template <class M, class T>
VISATTN_INLINE void pack_vector(const T* data, const int64_t* offset, int64_t channels, int64_t stride,
                                typename M::Elem* panel) {
  using Acc = typename M::Acc;
  constexpr int L = kTile<M>, W = kLanes<Acc>, P = M::kPair;
  const int64_t rows = ceil_div(channels, P);
  int64_t lanes;
  if (stride == 1) {
    for (int64_t c = 0; c < rows; c += W) {
      Vec<Acc> square[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        if (offset[l] == kNowhere)
          square[l] = Vec<Acc>{};
        else if constexpr (P == 1)
          square[l] = load_some<Acc>(data + offset[l] + c, channels - c);
#if defined(__AVX512BF16__)
        else {
          const int64_t n = channels - 2 * c;
          const __mmask32 mask = __mmask32(n >= 32 ? 0xffffffff : (int64_t(1) << n) - 1);
          square[l] = (VecF)_mm512_maskz_loadu_epi16(mask, data + offset[l] + 2 * c);
        }
#endif
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (c + i < rows) __builtin_memcpy(panel + (c + i) * L, &square[i], sizeof square[i]);
    }
    return;
  }
  if (adjacent_lanes(offset, W, &lanes)) {
    for (int64_t c = 0; c < rows; ++c) {
      const T* row = data + offset[0] + P * c * stride;
      if constexpr (P == 1) {
        store(panel + c * L, load_some<Acc>(row, lanes));
      } else {
#if defined(__AVX512BF16__)
        const __mmask16 mask = __mmask16(lanes >= 16 ? 0xffff : (1 << lanes) - 1);
        const __mmask16 second = 2 * c + 1 < channels ? mask : __mmask16(0);
        const T* next = second ? row + stride : row;
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, next));
        _mm512_storeu_si512(panel + c * L, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
#endif
      }
    }
    return;
  }
  for (int l = 0; l < W; ++l) {
    const T* row = data + (offset[l] == kNowhere ? 0 : offset[l]);
    for (int64_t c = 0; c < rows; ++c) {
      typename M::Elem x = 0;
      if (offset[l] != kNowhere) {
        if constexpr (P == 1)
          x = widen(row[c * stride]);
        else
          x = row[2 * c * stride].bits |
              (2 * c + 1 < channels ? uint32_t(row[(2 * c + 1) * stride].bits) << 16 : uint32_t(0));
      }
      panel[c * L + l] = x;
    }
  }
}

// Write one vector of a panel of sums to a tensor, times `factor`, plus rows [lane][channel] (`extra`, if any).
template <class Acc, class T>
VISATTN_INLINE void unpack_vector(const Acc* panel, int64_t ld, Vec<Acc> factor, const Acc* extra, int64_t ld_extra,
                                  T* data, const int64_t* offset, int64_t channels, int64_t stride) {
  constexpr int W = kLanes<Acc>;
  int64_t lanes;
  if (stride != 1 && !extra && adjacent_lanes(offset, W, &lanes)) {
    for (int64_t c = 0; c < channels; ++c)
      store_some(data + offset[0] + c * stride, load(panel + c * ld) * factor, lanes);
    return;
  }
  for (int64_t c = 0; c < channels; c += W) {
    Vec<Acc> square[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i] = c + i < channels ? load(panel + (c + i) * ld) * factor : Vec<Acc>{};
    transpose(square);
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) {
      if (offset[l] == kNowhere) continue;
      const Vec<Acc> row = extra ? square[l] + load(extra + l * ld_extra + c) : square[l];
      if (stride == 1)
        store_some(data + offset[l] + c, row, channels - c);
      else
        for (int64_t i = 0; i < W && c + i < channels; ++i) narrow(row[i], data + offset[l] + (c + i) * stride);
    }
  }
}

template <class M>
int64_t row_panel_elements(int64_t channels) {
  return ceil_div(channels, kTile<M>) * (kTile<M> / M::kPair) * kTile<M>;
}

// Pack a panel's positions as a right factor whose rows are positions (or pairs of them) and whose lanes are channels,
// in chunks of kTile channels: [channel / kTile][position / kPair][channel % kTile][position % kPair].
template <class M, class T>
VISATTN_INLINE void pack_row_panel(const Rows<T>& from, typename M::Elem* panel) {
  constexpr int L = kTile<M>;
  for (int64_t c = 0; c * L < from.channels; ++c) {
    const int64_t columns = min(int64_t(L), from.channels - c * L);
    for (int64_t r = 0; r < from.n; r += M::kPair) {
      typename M::Elem* to = panel + (c * (L / M::kPair) + r / M::kPair) * L;
      const bool has_a = from.offset[r] != kNowhere;
      const bool has_b = M::kPair == 2 && r + 1 < from.n && from.offset[r + 1] != kNowhere;
      const T* a = from.data + (has_a ? from.offset[r] : 0) + c * L * from.stride;
      if constexpr (M::kPair == 1) {
        for (int64_t d = 0; d < columns; ++d) to[d] = has_a ? widen(a[d * from.stride]) : 0;
      } else {
        const T* b = from.data + (has_b ? from.offset[r + 1] : 0) + c * L * from.stride;
        for (int64_t d = 0; d < columns; ++d)
          to[d] = (has_a ? a[d * from.stride].bits : 0) | (has_b ? uint32_t(b[d * from.stride].bits) << 16 : 0);
      }
      for (int64_t d = columns; d < L; ++d) to[d] = 0;
    }
  }
}

#if defined(__AVX512BF16__)
// Prepare a vector's weights [position][lane], rows [from, to) of which the first is even, as the right factor of a sum
// over positions: pairs of rows, rounded to bfloat16.
VISATTN_INLINE void pack_weight_pairs(const float* weights, int64_t from, int64_t to, uint32_t* packed) {
  constexpr int L = kTile<Pairs>;
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kInterleave);
  for (int64_t r = from; r < to; r += 2) {
    const __m512 a = _mm512_loadu_ps(weights + r * L);
    const __m512 b = r + 1 < to ? _mm512_loadu_ps(weights + (r + 1) * L) : _mm512_setzero_ps();
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // a in the low half
    _mm512_storeu_si512(packed + r / 2 * L, _mm512_permutexvar_epi16(order, both));
  }
}
#endif

// A panel of weights [position][lane] as the left factor of a sum over lanes: pairs of neighbouring lanes, zero from
// `lanes` on.
template <class M>
VISATTN_INLINE const typename M::Elem* pack_weight_rows([[maybe_unused]] const typename M::Acc* weights,
                                                        [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t lanes,
                                                        [[maybe_unused]] typename M::Elem* scratch) {
  if constexpr (M::kPair == 1) {
    return weights;
  } else {
#if defined(__AVX512BF16__)
    constexpr int L = kTile<M>;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t l = 0; l < lanes; l += 16) {
        const __mmask16 mask = __mmask16(lanes - l >= 16 ? 0xffff : (1 << (lanes - l)) - 1);
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, weights + r * L + l));
        _mm256_storeu_si256((__m256i*)(scratch + r * (L / 2) + l / 2), half);
      }
#endif
    return scratch;
  }
}

// Scratch memory handed out piece by piece; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* p = base ? (T*)(base + used) : nullptr;
    used += ceil_div(n * int64_t(sizeof(T)), 64) * 64;
    return p;
  }
};

// Sums over blocks for every panel of a tile, in two levels: `part` takes kFlush blocks, then joins `total`. Chains of
// roundings stay short on walks of any length.
template <class M>
struct BlockSums {
  using Acc = typename M::Acc;
  static constexpr int kFlush = 16, L = kTile<M>;
  Acc *parts, *totals;  // [panel][row][lane]
  int64_t rows, blocks;

  BlockSums(Arena& arena, int64_t rows)
      : parts(arena.take<Acc>(kPanels * rows * L)),
        totals(arena.take<Acc>(kPanels * rows * L)),
        rows(rows),
        blocks(0) {}

  Acc* part(int t) const { return parts + t * rows * L; }
  Acc* total(int t) const { return totals + t * rows * L; }

  void start(int panels) {
    blocks = 0;
    for (int64_t i = 0; i < panels * rows * L; i += kLanes<Acc>) store(parts + i, Vec<Acc>{});
  }

  // Call f(panel) for the panels that hold something of panel t.
  template <class F>
  VISATTN_INLINE void each(int t, F f) const {
    f(part(t));
    if (blocks >= kFlush) f(total(t));
  }

  // To be called after each block.
  void count_block(int panels) {
    if (++blocks % kFlush == 0) flush(panels, blocks == kFlush);
  }

  // To be called after the last block; `result` then is what was summed.
  void finish(int panels) {
    if (blocks >= kFlush && blocks % kFlush != 0) flush(panels, false);
  }
  const Acc* result(int t) const { return blocks < kFlush ? part(t) : total(t); }

  void flush(int panels, bool first) {
    constexpr int W = kLanes<Acc>;
    for (int64_t i = 0; i < panels * rows * L; i += W) {
      store(totals + i, first ? load(parts + i) : load(totals + i) + load(parts + i));
      store(parts + i, Vec<Acc>{});
    }
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
