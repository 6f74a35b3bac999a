// Moving positions between tensors and the engine's scratch memory.
//
// A tensor is read where it lies: a position is an offset, channels have a stride. Walked positions are staged block by
// block into a small contiguous copy in the engine's arithmetic; the copy keeps the order of the source (channels
// innermost, or positions innermost as in an NCHW image), since the product reads it by strides. The resident tile is
// packed once into a panel, channels by lanes.
#pragma once

#include "engine.h"
#include "product.h"

namespace visattn::cpu::VISATTN_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Offsets of consecutive positions (raster order) of a box of a map.
VISATTN_INLINE void offsets(const Map& map, const Box& box, int64_t first, int64_t n, int64_t* out) {
  int64_t y = first / box.w, x = first % box.w;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = (box.y + y) * map.y + (box.x + x) * map.x;
    if (++x == box.w) x = 0, ++y;
  }
}

// A block's source: positions by offset, channels by stride.
template <class T>
struct Rows {
  const T* data;
  const int64_t* offset;
  int64_t n;
  int64_t channels, stride;

  // Whether the positions follow one another without a gap, as in a map of one head.
  bool contiguous() const {
    bool yes = stride == 1;
    for (int64_t i = 1; i < n; ++i) yes &= offset[i] - offset[i - 1] == channels;
    return yes;
  }

  // Whether positions are adjacent in memory but channels are not: then channel by channel is the way to read.
  bool positions_innermost() const { return stride != 1 && n > 1 && offset[1] - offset[0] == 1; }
};

// Call copy(first, count) for each run of positions that are adjacent in memory.
template <class F>
VISATTN_INLINE void for_runs(const int64_t* offset, int64_t n, F copy) {
  for (int64_t i = 0, j; i < n; i = j) {
    for (j = i + 1; j < n && offset[j] - offset[j - 1] == 1;) ++j;
    copy(i, j - i);
  }
}

// Narrow heads make short runs: with AVX-512, masks take the place of a scalar tail.
template <class T, class Acc>
VISATTN_INLINE void widen_run(const T* from, Acc* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    for (; i < n; i += 16) {
      const __mmask16 mask = __mmask16(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
      __m512 x;
      if constexpr (__is_same(T, float))
        x = _mm512_maskz_loadu_ps(mask, from + i);
      else if constexpr (__is_same(T, bf16))
        x = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + i)), 16);
      else
        x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i));
      _mm512_mask_storeu_ps(to + i, mask, x);
    }
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2 && !__is_same(T, bf16))
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps((float*)to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; ++i) to[i] = widen(from[i]);
}

#if defined(__AVX512BF16__)
VISATTN_INLINE void interleave(const bf16* a, const bf16* b, uint32_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = __mmask16(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a + i));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + i));
    _mm512_mask_storeu_epi32(to + i, mask, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

// What is staged, with the strides by which a product reads it.
template <class M>
struct Staged {
  const typename M::Elem* data;
  Strides scores, sums;      // rows are positions; rows are channels
  int64_t scores_k, sums_k;  // length of the products' inner dimension
};

// Which of the two products a block is staged for. Plain arithmetic serves both with one copy.
enum class Use { kScores, kSums };

template <class M>
int64_t staged_elements(int64_t channels) {
  return M::kPair == 1 ? channels * kBlock : ceil_div(channels + 1, 2) * (kBlock + 2);
}

template <class M, class T>
VISATTN_INLINE Staged<M> stage(const Rows<T>& from, Use use, typename M::Elem* to) {
  const int64_t n = from.n, channels = from.channels, stride = from.stride;
  if constexpr (M::kPair == 1) {
    if (from.positions_innermost()) {  // [channel][position]
      for (int64_t c = 0; c < channels; ++c)
        for_runs(from.offset, n, [&](int64_t i, int64_t count) {
          widen_run(from.data + from.offset[i] + c * stride, to + c * kBlock + i, count);
        });
      return {to, {1, kBlock}, {kBlock, 1}, channels, n};
    }
    if (from.contiguous()) {  // [position][channel], as in the source
      widen_run(from.data + from.offset[0], to, n * channels);
      return {to, {channels, 1}, {1, channels}, channels, n};
    }
    for (int64_t r = 0; r < n; ++r) {  // [position][channel]
      const T* row = from.data + from.offset[r];
      if (stride == 1)
        widen_run(row, to + r * channels, channels);
      else
        for (int64_t c = 0; c < channels; ++c) to[r * channels + c] = widen(row[c * stride]);
    }
    return {to, {channels, 1}, {1, channels}, channels, n};
  } else {
    uint16_t* half = (uint16_t*)to;
    if (use == Use::kScores) {  // pairs along channels
      const int64_t pairs = ceil_div(channels, 2);
      if (from.positions_innermost()) {  // [channel / 2][position][2]
        for (int64_t c = 0; c < 2 * pairs; ++c)
          for_runs(from.offset, n, [&](int64_t i, int64_t count) {
            const T* row = from.data + from.offset[i] + c * stride;
            uint16_t* target = half + ((c / 2) * kBlock + i) * 2 + c % 2;
            for (int64_t j = 0; j < count; ++j) target[2 * j] = c < channels ? row[j].bits : 0;
          });
        return {to, {1, kBlock}, {}, pairs, 0};
      }
      for (int64_t r = 0; r < n; ++r) {  // [position][channel]
        const T* row = from.data + from.offset[r];
        uint16_t* target = half + r * 2 * pairs;
        if (stride == 1)
          __builtin_memcpy(target, row, 2 * channels);
        else
          for (int64_t c = 0; c < channels; ++c) target[c] = row[c * stride].bits;
        if (channels % 2) target[channels] = 0;
      }
      return {to, {pairs, 1}, {}, pairs, 0};
    }
    const int64_t pairs = ceil_div(n, 2);  // pairs along positions
    if (from.positions_innermost()) {      // [channel][position]
      for (int64_t c = 0; c < channels; ++c) {
        uint16_t* target = half + c * kBlock;
        for_runs(from.offset, n, [&](int64_t i, int64_t count) {
          __builtin_memcpy(target + i, from.data + from.offset[i] + c * stride, 2 * count);
        });
        if (n % 2) target[n] = 0;
      }
      return {to, {}, {kBlock / 2, 1}, 0, pairs};
    }
    for (int64_t r = 0; r < pairs; ++r) {  // [position / 2][channel][2]
      const T* a = from.data + from.offset[2 * r];
      typename M::Elem* target = to + r * channels;
      if (2 * r + 1 < n) {
        const T* b = from.data + from.offset[2 * r + 1];
        if (stride == 1)
          interleave(a, b, target, channels);
        else
          for (int64_t c = 0; c < channels; ++c) target[c] = a[c * stride].bits | uint32_t(b[c * stride].bits) << 16;
      } else {
        for (int64_t c = 0; c < channels; ++c) target[c] = a[c * stride].bits;
      }
    }
    return {to, {}, {1, channels}, 0, pairs};
  }
}

template <class M>
int64_t panel_elements(int64_t channels) {
  return ceil_div(channels, M::kPair) * kTile<M>;
}

// Pack up to kTile positions into a panel [channel (or pair)][lane], zeros in the lanes that are left over. Nothing is
// scaled here: the product applies its factor, so that a score has the same bits whichever side is resident.
template <class M, class T>
VISATTN_INLINE void pack_panel(const Rows<T>& from, typename M::Elem* panel) {
  constexpr int L = kTile<M>;
  const int64_t lanes = ceil_div(from.n, kLanes<typename M::Acc>) * kLanes<typename M::Acc>;
  for (int64_t l = 0; l < lanes; ++l) {
    if (l >= from.n) {
      for (int64_t c = 0; c < ceil_div(from.channels, M::kPair); ++c) panel[c * L + l] = 0;
      continue;
    }
    const T* row = from.data + from.offset[l];
    if constexpr (M::kPair == 1) {
      for (int64_t c = 0; c < from.channels; ++c) panel[c * L + l] = widen(row[c * from.stride]);
    } else {
      for (int64_t c = 0; c + 1 < from.channels; c += 2)
        panel[c / 2 * L + l] = row[c * from.stride].bits | uint32_t(row[(c + 1) * from.stride].bits) << 16;
      if (from.channels % 2) panel[from.channels / 2 * L + l] = row[(from.channels - 1) * from.stride].bits;
    }
  }
}

template <class M>
int64_t row_panel_elements(int64_t channels) {
  return ceil_div(channels, kTile<M>) * (kTile<M> / M::kPair) * kTile<M>;
}

// Pack the same positions as a right factor whose rows are positions (or pairs of them) and whose lanes are channels,
// in chunks of kTile channels: [channel / kTile][position / kPair][channel % kTile][position % kPair].
template <class M, class T>
VISATTN_INLINE void pack_row_panel(const Rows<T>& from, typename M::Elem* panel) {
  constexpr int L = kTile<M>;
  for (int64_t c = 0; c * L < from.channels; ++c) {
    const int64_t columns = min(int64_t(L), from.channels - c * L);
    for (int64_t r = 0; r < from.n; r += M::kPair) {
      typename M::Elem* to = panel + (c * (L / M::kPair) + r / M::kPair) * L;
      const T* a = from.data + from.offset[r] + c * L * from.stride;
      if constexpr (M::kPair == 1) {
        for (int64_t d = 0; d < columns; ++d) to[d] = widen(a[d * from.stride]);
      } else {
        const T* b = r + 1 < from.n ? from.data + from.offset[r + 1] + c * L * from.stride : nullptr;
        for (int64_t d = 0; d < columns; ++d)
          to[d] = a[d * from.stride].bits | (b ? uint32_t(b[d * from.stride].bits) << 16 : 0);
      }
      for (int64_t d = columns; d < L; ++d) to[d] = 0;
    }
  }
}

// Write the first n lanes of a panel of sums to a tensor, times a factor per lane.
template <class M, class T>
VISATTN_INLINE void unpack_panel(const typename M::Acc* panel, const typename M::Acc* factor, T* data,
                                 const int64_t* offset, int64_t n, int64_t channels, int64_t stride) {
  for (int64_t l = 0; l < n; ++l)
    for (int64_t c = 0; c < channels; ++c) narrow(panel[c * kTile<M> + l] * factor[l], data + offset[l] + c * stride);
}

// Prepare a panel of weights [position][lane] as the right factor of a sum over positions: pairs of rows, rounded to
// bfloat16, where the arithmetic wants pairs.
template <class M>
VISATTN_INLINE const typename M::Elem* pack_weights([[maybe_unused]] const typename M::Acc* weights,
                                                    [[maybe_unused]] int64_t n, [[maybe_unused]] int vectors,
                                                    [[maybe_unused]] typename M::Elem* scratch) {
  if constexpr (M::kPair == 1) {
    return weights;
  } else {
#if defined(__AVX512BF16__)
    constexpr int L = kTile<M>;
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kInterleave);
    for (int64_t r = 0; r < n; r += 2)
      for (int v = 0; v < vectors; ++v) {
        const float* p = weights + r * L + v * 16;
        const __m512 a = _mm512_loadu_ps(p);
        const __m512 b = r + 1 < n ? _mm512_loadu_ps(p + L) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);  // a in the low half
        _mm512_storeu_si512(scratch + r / 2 * L + v * 16, _mm512_permutexvar_epi16(order, both));
      }
#endif
    return scratch;
  }
}

// The same weights as the left factor of a sum over lanes: pairs of neighbouring lanes, zero from `lanes` on.
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

// A sum over blocks in two levels: `part` takes kFlush blocks, then joins `total`. Chains of roundings stay short on
// walks of any length.
template <class M>
struct BlockSum {
  using Acc = typename M::Acc;
  static constexpr int kFlush = 16;
  Acc *part, *total;
  int64_t rows;

  BlockSum(Arena& arena, int64_t rows)
      : part(arena.take<Acc>(rows * kTile<M>)), total(arena.take<Acc>(rows * kTile<M>)), rows(rows) {}

  // Call f(panel) for the panels that hold something before block number `block`.
  template <class F>
  VISATTN_INLINE void each(int64_t block, F f) const {
    if (block % kFlush != 0) f(part);
    if (block >= kFlush) f(total);
  }

  void add(int64_t block, int vectors, const typename M::Elem* a, Strides s, int64_t nk, const typename M::Elem* b) {
    if (block % kFlush == 0)
      product<M, false>(vectors, a, s, rows, nk, b, part, Acc(1));
    else
      product<M, true>(vectors, a, s, rows, nk, b, part, Acc(1));
    if (block % kFlush == kFlush - 1) flush(block);
  }

  // The sum, after `blocks` blocks.
  const Acc* finish(int64_t blocks) {
    if (blocks < kFlush) return part;
    if (blocks % kFlush != 0) flush(blocks);
    return total;
  }

  void flush(int64_t block) {
    const bool first = block < kFlush;
    constexpr int W = kLanes<Acc>;
    for (int64_t i = 0; i < rows * kTile<M>; i += W)
      store(total + i, first ? load(part + i) : load(total + i) + load(part + i));
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
