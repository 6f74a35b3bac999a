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

// The offset of a position that no tensor has: it is staged as zeros. (A key outside the map, or a lane left over.)
constexpr int64_t kNowhere = -(int64_t(1) << 62);

// The offset to form a pointer with, which must be one of the tensor even if it is not read.
constexpr int64_t somewhere(int64_t offset) { return offset == kNowhere ? 0 : offset; }

// A block's source: positions by offset, channels by stride.
template <class T>
struct Rows {
  const T* data;
  const int64_t* offset;
  int64_t n;
  int64_t channels, stride;

  // Whether the positions follow one another without a gap, as in a map of one head.
  bool contiguous() const {
    bool yes = stride == 1 && offset[0] != kNowhere;
    for (int64_t i = 1; i < n; ++i) yes &= offset[i] - offset[i - 1] == channels;
    return yes;
  }

  // Whether positions are adjacent in memory but channels are not: then channel by channel is the way to read.
  bool positions_innermost() const { return stride != 1 && n > 1 && offset[n / 2] - offset[n / 2 - 1] == 1; }
};

// Call copy(first, count) for each run of positions that are adjacent in memory (or nowhere).
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
  if constexpr (__is_same(T, Acc))
    for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) store(to + i, load(from + i));
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
  bool infinite = false;     // whether a sum over it must look at weights of zero
};

// Which of the two products a block is staged for. Plain arithmetic serves both with one copy.
enum class Use { kScores, kSums };

// The length of staged rows of n elements. Rows a large power of two apart would fall into a few sets of the cache.
template <class Elem>
constexpr int64_t row_length(int64_t n) {
  return n * int64_t(sizeof(Elem)) % 256 == 0 ? n + 64 / int64_t(sizeof(Elem)) : n;
}

template <class M>
int64_t staged_elements(int64_t channels) {
  using Elem = typename M::Elem;
  const int64_t pairs = ceil_div(channels, M::kPair), half = kBlock / M::kPair;
  return max(max(kBlock * row_length<Elem>(pairs), pairs * row_length<Elem>(kBlock)),
             max(half * row_length<Elem>(channels), channels * row_length<Elem>(half)));
}

template <class M, class T>
VISATTN_INLINE Staged<M> stage(const Rows<T>& from, Use use, typename M::Elem* to) {
  using Elem = typename M::Elem;
  const int64_t n = from.n, channels = from.channels, stride = from.stride;
  if constexpr (M::kPair == 1) {
    if (from.positions_innermost()) {  // [channel][position]
      constexpr int64_t ld = row_length<Elem>(kBlock);
      for (int64_t c = 0; c < channels; ++c)
        for_runs(from.offset, n, [&](int64_t i, int64_t count) {
          if (from.offset[i] == kNowhere)
            to[c * ld + i] = 0;
          else
            widen_run(from.data + from.offset[i] + c * stride, to + c * ld + i, count);
        });
      return {to, {1, ld}, {ld, 1}, channels, n};
    }
    const int64_t ld = row_length<Elem>(channels);
    if (ld == channels && from.contiguous()) {  // [position][channel], as in the source
      widen_run(from.data + from.offset[0], to, n * channels);
      return {to, {ld, 1}, {1, ld}, channels, n};
    }
    for (int64_t r = 0; r < n; ++r) {  // [position][channel]
      const T* row = from.data + somewhere(from.offset[r]);
      if (from.offset[r] == kNowhere)
        for (int64_t c = 0; c < channels; ++c) to[r * ld + c] = 0;
      else if (stride == 1)
        widen_run(row, to + r * ld, channels);
      else
        for (int64_t c = 0; c < channels; ++c) to[r * ld + c] = widen(row[c * stride]);
    }
    return {to, {ld, 1}, {1, ld}, channels, n};
  } else {
    uint16_t* half = (uint16_t*)to;
    if (use == Use::kScores) {  // pairs along channels
      const int64_t pairs = ceil_div(channels, 2);
      if (from.positions_innermost()) {  // [channel / 2][position][2]
        constexpr int64_t ld = row_length<Elem>(kBlock);
        for (int64_t c = 0; c < 2 * pairs; ++c)
          for_runs(from.offset, n, [&](int64_t i, int64_t count) {
            const T* row = from.data + somewhere(from.offset[i]) + c * stride;
            uint16_t* target = half + ((c / 2) * ld + i) * 2 + c % 2;
            const bool there = c < channels && from.offset[i] != kNowhere;
            for (int64_t j = 0; j < count; ++j) target[2 * j] = there ? row[j].bits : 0;
          });
        return {to, {1, ld}, {}, pairs, 0};
      }
      const int64_t ld = row_length<Elem>(pairs);
      for (int64_t r = 0; r < n; ++r) {  // [position][channel]
        const T* row = from.data + somewhere(from.offset[r]);
        uint16_t* target = half + r * 2 * ld;
        if (from.offset[r] == kNowhere)
          for (int64_t c = 0; c < channels; ++c) target[c] = 0;
        else if (stride == 1)
          __builtin_memcpy(target, row, 2 * channels);
        else
          for (int64_t c = 0; c < channels; ++c) target[c] = row[c * stride].bits;
        if (channels % 2) target[channels] = 0;
      }
      return {to, {ld, 1}, {}, pairs, 0};
    }
    const int64_t pairs = ceil_div(n, 2);  // pairs along positions
    if (from.positions_innermost()) {      // [channel][position]
      constexpr int64_t ld = row_length<Elem>(kBlock / 2);
      for (int64_t c = 0; c < channels; ++c) {
        uint16_t* target = half + c * 2 * ld;
        for_runs(from.offset, n, [&](int64_t i, int64_t count) {
          if (from.offset[i] == kNowhere)
            target[i] = 0;
          else
            __builtin_memcpy(target + i, from.data + from.offset[i] + c * stride, 2 * count);
        });
        if (n % 2) target[n] = 0;
      }
      return {to, {}, {ld, 1}, 0, pairs};
    }
    const int64_t ld = row_length<Elem>(channels);
    for (int64_t r = 0; r < pairs; ++r) {  // [position / 2][channel][2]
      const bool has_a = from.offset[2 * r] != kNowhere;
      const bool has_b = 2 * r + 1 < n && from.offset[2 * r + 1] != kNowhere;
      const T* a = from.data + (has_a ? from.offset[2 * r] : 0);
      const T* b = from.data + (has_b ? from.offset[2 * r + 1] : 0);
      Elem* target = to + r * ld;
      if (has_a && has_b && stride == 1)
        interleave(a, b, target, channels);
      else
        for (int64_t c = 0; c < channels; ++c)
          target[c] = (has_a ? a[c * stride].bits : 0) | (has_b ? uint32_t(b[c * stride].bits) << 16 : 0);
    }
    return {to, {}, {1, ld}, 0, pairs};
  }
}

// Whether any of n elements is a NaN or an infinity.
template <class M>
VISATTN_INLINE bool any_not_finite(const typename M::Elem* p, int64_t n) {
  if constexpr (M::kPair == 1) {
    constexpr int W = kLanes<typename M::Acc>;
    Vec<typename M::Acc> zero{};
    int64_t i = 0;
    for (; i + W <= n; i += W) zero += load(p + i) - load(p + i);
    bool any = any_differs(zero, decltype(zero){});
    for (; i < n; ++i) any |= !(p[i] - p[i] == 0);
    return any;
  } else {
    uint32_t any = 0;
    for (int64_t i = 0; i < n; ++i)
      any |= uint32_t((p[i] & 0x7f80) == 0x7f80) | uint32_t((p[i] & 0x7f800000) == 0x7f800000);
    return any != 0;
  }
}

// The same for a block that was staged for sums.
template <class M>
VISATTN_INLINE bool any_not_finite(const Staged<M>& block, int64_t channels) {
  const bool by_position = block.sums.row == 1;
  const int64_t rows = by_position ? block.sums_k : channels, length = by_position ? channels : block.sums_k;
  const int64_t ld = by_position ? block.sums.k : block.sums.row;
  bool any = false;
  for (int64_t r = 0; r < rows; ++r) any |= any_not_finite<M>(block.data + r * ld, length);
  return any;
}

}  // namespace visattn::cpu::VISATTN_ISA
