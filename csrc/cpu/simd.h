// The SIMD layer: one vector type per instruction set, and the few operations the engine needs on it.
//
// The engine's sources are compiled once per instruction set, each time inside a namespace of its own (VISATTN_ISA),
// so that the linker can never merge a function compiled for one with the same function compiled for another. For the
// same reason these files call nothing inline from the standard library.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VISATTN_INLINE inline __attribute__((always_inline))

namespace visattn::cpu::VISATTN_ISA {

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectors = 4;  // vectors of a panel row
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectors = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectors = 2;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecL __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecK __attribute__((vector_size(kVectorBytes)));

template <class T>
struct Vector;
template <>
struct Vector<float> {
  using Type = VecF;
  using Bits = VecU;
  using Index = int32_t;
};
template <>
struct Vector<double> {
  using Type = VecD;
  using Bits = VecL;
  using Index = int64_t;
};
template <>
struct Vector<int32_t> {
  using Type = VecI;
};
template <>
struct Vector<int64_t> {
  using Type = VecK;
};
template <>
struct Vector<uint32_t> {
  using Type = VecU;
  using Bits = VecU;
};

template <class T>
using Vec = typename Vector<T>::Type;
template <class T>
using Index = typename Vector<T>::Index;  // an integer as wide as a lane
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
VISATTN_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class T>
VISATTN_INLINE void store(T* p, Vec<T> x) {
  __builtin_memcpy(p, &x, sizeof x);
}

template <class T>
VISATTN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // one broadcast: the compiler sees through x - 0
}

// NaN in `b` passes, so that a NaN score reaches the result; in `min` too.
VISATTN_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

VISATTN_INLINE VecD max(VecD a, VecD b) {
#if defined(__AVX512F__)
  return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

VISATTN_INLINE VecF min(VecF a, VecF b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

VISATTN_INLINE VecD min(VecD a, VecD b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

template <class V>
VISATTN_INLINE V zero_if_infinite(V x) {
  const auto inf = broadcast(decltype(x[0] + x[0])(__builtin_inf()));
  return ((x == inf) | (x == -inf)) ? V{} : x;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// All ones in the first n lanes (n >= 8: in all).
VISATTN_INLINE __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n < 8 ? n : 8)), lane);
}
#endif

template <class V>
VISATTN_INLINE bool any_differs(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NEQ_UQ)) != 0;
#endif
  const auto differs = a != b;
  bool any = false;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) any |= differs[i] != 0;
  return any;
}

// base[index] for each lane.
VISATTN_INLINE VecF gather(const float* base, VecI index) {
#if defined(__AVX512F__)
  return (VecF)_mm512_i32gather_ps((__m512i)index, base, 4);
#elif defined(__AVX2__)
  return (VecF)_mm256_i32gather_ps(base, (__m256i)index, 4);
#else
  VecF x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = base[index[i]];
  return x;
#endif
}

VISATTN_INLINE VecD gather(const double* base, VecK index) {
  VecD x;
  for (int i = 0; i < kLanes<double>; ++i) x[i] = base[index[i]];
  return x;
}

// The lanes' sum, by halves.
template <class V>
VISATTN_INLINE auto sum_of_lanes(V x) {
  constexpr int n = int(sizeof(V) / sizeof(x[0]));
  decltype(x[0] + x[0]) half[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) half[i] = x[i];
#pragma GCC unroll 4
  for (int width = n / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  return half[0];
}

// Transpose a square of kLanes x kLanes numbers, given by rows.
VISATTN_INLINE void transpose(VecF* rows) {
#if defined(__AVX512F__)
  __m512 t[16], u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + j], (__m512d)t[i + 2 + j]);
      u[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + j], (__m512d)t[i + 2 + j]);
    }
  // u[4 g + c]: in each quarter q, column 4 q + c of rows 4 g and following
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd), e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    rows[c] = (VecF)_mm512_shuffle_f32x4(a, b, 0x88);
    rows[8 + c] = (VecF)_mm512_shuffle_f32x4(a, b, 0xdd);
    rows[4 + c] = (VecF)_mm512_shuffle_f32x4(d, e, 0x88);
    rows[12 + c] = (VecF)_mm512_shuffle_f32x4(d, e, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8], u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c] = (VecF)_mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    rows[4 + c] = (VecF)_mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
#else
  for (int i = 0; i < kLanes<float>; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
#endif
}

VISATTN_INLINE void transpose(VecD* rows) {
  for (int i = 0; i < kLanes<double>; ++i)
    for (int j = 0; j < i; ++j) {
      const double x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
}

constexpr double kLog2E = 1.44269504088896340735992468100;
constexpr double kLn2 = 0.693147180559945309417232121458;

// e^x: 2^t, t = x log2(e), by a polynomial of degree 6 on [-1/2, 1/2], the minimax of the relative error (2e-9, so that
// float32's own rounding is what remains) among those with 2^0 = 1 exactly. 0 for -inf, inf for inf, NaN for NaN.
VISATTN_INLINE VecF exp(VecF x) {
  constexpr float c[] = {6.931472027e-01f, 2.402264783e-01f, 5.550332550e-02f,
                         9.618444332e-03f, 1.339886607e-03f, 1.535184789e-04f};
  VecF t = x * float(kLog2E);
#if defined(__AVX512F__)
  // The reduction gives t - n, and 0 for an infinity, which scalef then handles.
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const VecF f = (VecF)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  t = min(broadcast(128.f), max(broadcast(-127.f), t));
#if defined(__AVX2__)
  const VecF n = (VecF)_mm256_round_ps((__m256)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecF magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF n = (t + magic) - magic;
#endif
  const VecF f = t - n;
#endif
  VecF p = broadcast(c[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; --i) p = p * f + c[i];
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const VecI bits = (__builtin_convertvector(n, VecI) + 127) << 23;  // n = -127 gives 0, n = 128 infinity
  return p * (VecF)bits;
#endif
}

// The same to double precision: 13 terms of the series, 4e-18 on [-1/2, 1/2].
VISATTN_INLINE VecD exp(VecD x) {
  VecD t = x * kLog2E;
  t = min(broadcast(1024.), max(broadcast(-1023.), t));
  const VecD magic = broadcast(6755399441055744.);  // 1.5 * 2^52
  const VecD shifted = t + magic;
  const VecD n = shifted - magic;
  const VecD f = (t - n) * kLn2;
  VecD p = broadcast(1. / 6227020800.);
  constexpr double inverse_factorial[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,      1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600};
#pragma GCC unroll 16
  for (int i = 12; i >= 0; --i) p = p * f + inverse_factorial[i];
  // The low bits of `shifted` hold n in two's complement.
  const VecL bits = ((VecL)shifted + 1023) << 52;
  return p * (VecD)bits;
}

VISATTN_INLINE float natural_log(float x) { return __builtin_logf(x); }
VISATTN_INLINE double natural_log(double x) { return __builtin_log(x); }

// Conversions of stored elements.
VISATTN_INLINE float widen(float x) { return x; }
VISATTN_INLINE double widen(double x) { return x; }
VISATTN_INLINE float widen(f16 x) { return float(x); }
VISATTN_INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

// Round to nearest, ties to even; NaN stays NaN.
VISATTN_INLINE uint16_t bf16_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t(x != x ? (bits >> 16) | 0x40 : rounded);
}

VISATTN_INLINE void narrow(float x, float* y) { *y = x; }
VISATTN_INLINE void narrow(double x, double* y) { *y = x; }
VISATTN_INLINE void narrow(float x, f16* y) { *y = f16(x); }
VISATTN_INLINE void narrow(float x, bf16* y) { y->bits = bf16_bits(x); }

}  // namespace visattn::cpu::VISATTN_ISA
