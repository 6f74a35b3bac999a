// AVX-512 on a CPU without it: the intrinsics that the CPU engine uses and no others, lane by lane in plain C++, so
// that the engine's AVX-512 paths can be tested anywhere. It shows what they compute and what memory they touch, not
// how fast.
//
// With this folder first on the include path it takes the place of the compiler's <immintrin.h>, which it includes;
// each intrinsic then becomes a macro. The feature macros are defined here and not on the command line, since the
// compiler's header would believe them. Each function follows the operation and the table of special cases in Intel's
// Software Developer's Manual, volume 2, under default MXCSR: round to nearest, denormals kept except where the
// instruction itself flushes them. tests/test_avx512_emulated.py holds each to values worked out by hand and, on a CPU
// that has it, to the instruction.
#pragma once

#include_next <immintrin.h>

#include <stdint.h>

#if defined(__AVX512F__)
#error "compile without AVX-512 to emulate it"
#endif
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#if defined(VISATTN_EMULATE_AVX512_BF16)
#define __AVX512BF16__ 1
#endif

#define VISATTN_EMULATED inline __attribute__((always_inline))

// Unnamed, so that no copy of a function here can serve a source that is compiled for another instruction set.
namespace visattn_emulated {
namespace {

// A register as an array: the compiler makes vectors of loops over it, not of loops over a vector's subscripts.
template <class T, int N>
struct Lanes {
  T x[N];
};
template <class T>
using Register = Lanes<T, 64 / int(sizeof(T))>;
template <class T>
using HalfRegister = Lanes<T, 32 / int(sizeof(T))>;

template <class To, class From>
VISATTN_EMULATED To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// An element in memory, wherever it lies and whatever it is declared as.
template <class T>
VISATTN_EMULATED T read(const void* p, int64_t i) {
  T x;
  __builtin_memcpy(&x, (const char*)p + i * int64_t(sizeof x), sizeof x);
  return x;
}

// A lane that the mask leaves out is neither read nor written: its address may be anyone's.
template <class T, int N>
VISATTN_EMULATED Lanes<T, N> read_masked(uint32_t mask, const void* p) {
  Lanes<T, N> to;
  for (int i = 0; i < N; ++i) {
    to.x[i] = T(0);
    if (mask >> i & 1) to.x[i] = read<T>(p, i);
  }
  return to;
}

template <class T, int N>
VISATTN_EMULATED void write_masked(void* p, uint32_t mask, const Lanes<T, N>& from) {
  for (int i = 0; i < N; ++i)
    if (mask >> i & 1) __builtin_memcpy((char*)p + i * int64_t(sizeof(T)), &from.x[i], sizeof(T));
}

constexpr uint32_t kSign = 0x80000000, kInfinity = 0x7f800000, kQuiet = 0x00400000, kIndefinite = 0xffc00000;
constexpr uint32_t kLeastNormal = 0x00800000;

VISATTN_EMULATED bool is_nan(float x) { return (bits_as<uint32_t>(x) & ~kSign) > kInfinity; }
VISATTN_EMULATED float quiet(float x) { return bits_as<float>(bits_as<uint32_t>(x) | kQuiet); }

// Zeros for denormals, of their sign.
VISATTN_EMULATED float flush(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return bits_as<float>(bits & kInfinity ? bits : bits & kSign);
}

VISATTN_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  auto x = bits_as<Register<float>>(a), y = bits_as<Register<float>>(b);
  for (int i = 0; i < 16; ++i) x.x[i] = x.x[i] > y.x[i] ? x.x[i] : y.x[i];  // b if either is NaN, or both are zeros
  return bits_as<__m512>(x);
}

VISATTN_EMULATED __m512d max_pd(__m512d a, __m512d b) {
  auto x = bits_as<Register<double>>(a), y = bits_as<Register<double>>(b);
  for (int i = 0; i < 8; ++i) x.x[i] = x.x[i] > y.x[i] ? x.x[i] : y.x[i];
  return bits_as<__m512d>(x);
}

template <int kPredicate>
VISATTN_EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  static_assert(kPredicate == _CMP_NEQ_UQ, "not equal, or not comparable, alone");
  const auto x = bits_as<Register<float>>(a), y = bits_as<Register<float>>(b);
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = __mmask16(mask | (x.x[i] != y.x[i]) << i);
  return mask;
}

template <int kControl>
VISATTN_EMULATED __m512 roundscale_ps(__m512 a) {
  static_assert(kControl == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), "to nearest integers alone");
  auto x = bits_as<Register<float>>(a);
  for (int i = 0; i < 16; ++i) x.x[i] = __builtin_rintf(x.x[i]);
  return bits_as<__m512>(x);
}

template <int kControl>
VISATTN_EMULATED __m512 reduce_ps(__m512 a) {
  static_assert(kControl == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), "by nearest integers alone");
  auto x = bits_as<Register<float>>(a);
  for (int i = 0; i < 16; ++i) {
    const bool infinite = (bits_as<uint32_t>(x.x[i]) & ~kSign) == kInfinity;
    const float rest = x.x[i] - __builtin_rintf(x.x[i]);  // exact; +0 for either zero
    x.x[i] = infinite ? 0.f : rest;
  }
  return bits_as<__m512>(x);
}

// x * 2^floor(y), rounded once: the product is exact in double precision.
VISATTN_EMULATED float scale(float x, float y) {
  const uint32_t sign = bits_as<uint32_t>(x) & kSign, size = bits_as<uint32_t>(x) & ~kSign;
  const uint32_t by = bits_as<uint32_t>(y);
  const bool up = by == kInfinity, down = by == (kInfinity | kSign);
  const float inside = y > 400.f ? 400.f : y > -400.f ? y : -400.f;  // beyond, all is zero or infinite; NaN is -400
  const double power = bits_as<double>(uint64_t(int64_t(__builtin_floorf(inside)) + 1023) << 52);
  float result = float(double(x) * power);
  if (up) result = bits_as<float>(size == 0 ? kIndefinite : kInfinity | sign);
  if (down) result = bits_as<float>(size == kInfinity ? kIndefinite : sign);
  if (is_nan(y)) result = quiet(y);
  if (is_nan(x)) {
    const bool was_quiet = size & kQuiet;
    result = was_quiet && up ? y : was_quiet && down ? 0.f : quiet(x);
  }
  return result;
}

VISATTN_EMULATED __m512 scalef_ps(__m512 a, __m512 b) {
  auto x = bits_as<Register<float>>(a), y = bits_as<Register<float>>(b);
  for (int i = 0; i < 16; ++i) x.x[i] = scale(x.x[i], y.x[i]);
  return bits_as<__m512>(x);
}

template <int kScale>
VISATTN_EMULATED __m512 i32gather_ps(__m512i index, const void* base) {
  const auto at = bits_as<Register<int32_t>>(index);
  Register<float> x;
  for (int i = 0; i < 16; ++i) x.x[i] = read<float>((const char*)base + int64_t(at.x[i]) * kScale, 0);
  return bits_as<__m512>(x);
}

// Halves of each 128 bits, alternately from a and b.
template <class T, class V>
VISATTN_EMULATED V unpack(V a, V b, int half) {
  constexpr int kQuarter = 16 / int(sizeof(T));
  const auto x = bits_as<Register<T>>(a), y = bits_as<Register<T>>(b);
  Register<T> to;
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < kQuarter; ++i) {
      const int from = q * kQuarter + half * kQuarter / 2 + i / 2;
      to.x[q * kQuarter + i] = i % 2 ? y.x[from] : x.x[from];
    }
  return bits_as<V>(to);
}

// Quarters of 128 bits: two of a, two of b, each chosen by two bits.
template <int kControl>
VISATTN_EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b) {
  const auto x = bits_as<Register<float>>(a), y = bits_as<Register<float>>(b);
  Register<float> to;
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < 4; ++i) {
      const int from = (kControl >> 2 * q & 3) * 4 + i;
      to.x[q * 4 + i] = q < 2 ? x.x[from] : y.x[from];
    }
  return bits_as<__m512>(to);
}

VISATTN_EMULATED __m512i permutexvar_epi16(__m512i index, __m512i a) {
  const auto at = bits_as<Register<uint16_t>>(index), x = bits_as<Register<uint16_t>>(a);
  Register<uint16_t> to;
  for (int i = 0; i < 32; ++i) to.x[i] = x.x[at.x[i] & 31];
  return bits_as<__m512i>(to);
}

VISATTN_EMULATED __m512i or_si512(__m512i a, __m512i b) {
  auto x = bits_as<Register<uint64_t>>(a), y = bits_as<Register<uint64_t>>(b);
  for (int i = 0; i < 8; ++i) x.x[i] |= y.x[i];
  return bits_as<__m512i>(x);
}

VISATTN_EMULATED __m512i slli_epi32(__m512i a, unsigned count) {
  auto x = bits_as<Register<uint32_t>>(a);
  for (int i = 0; i < 16; ++i) x.x[i] = count < 32 ? x.x[i] << count : 0;
  return bits_as<__m512i>(x);
}

VISATTN_EMULATED __m512i set1_epi32(int a) {
  Register<int> x;
  for (int i = 0; i < 16; ++i) x.x[i] = a;
  return bits_as<__m512i>(x);
}

VISATTN_EMULATED __m512 setzero_ps() { return bits_as<__m512>(Register<float>{}); }

VISATTN_EMULATED __m512i cvtepu16_epi32(__m256i a) {
  const auto x = bits_as<HalfRegister<uint16_t>>(a);
  Register<uint32_t> to;
  for (int i = 0; i < 16; ++i) to.x[i] = x.x[i];
  return bits_as<__m512i>(to);
}

VISATTN_EMULATED __m512 cvtph_ps(__m256i a) {
  const auto x = bits_as<HalfRegister<_Float16>>(a);
  Register<float> to;
  for (int i = 0; i < 16; ++i) to.x[i] = float(x.x[i]);
  return bits_as<__m512>(to);
}

template <int kControl>
VISATTN_EMULATED __m256i cvtps_ph(__m512 a) {
  static_assert(kControl == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), "rounding to nearest alone");
  const auto x = bits_as<Register<float>>(a);
  HalfRegister<_Float16> to;
  for (int i = 0; i < 16; ++i) to.x[i] = _Float16(x.x[i]);
  return bits_as<__m256i>(to);
}

// To bfloat16: to nearest, ties to even, denormals to zero.
VISATTN_EMULATED uint16_t narrow(float x) {
  const uint32_t bits = bits_as<uint32_t>(flush(x));
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // leaves zeros and infinities alone
  return uint16_t((is_nan(x) ? bits | kQuiet : rounded) >> 16);
}

VISATTN_EMULATED __m256bh cvtneps_pbh(__m512 a) {
  const auto x = bits_as<Register<float>>(a);
  HalfRegister<uint16_t> to;
  for (int i = 0; i < 16; ++i) to.x[i] = narrow(x.x[i]);
  return bits_as<__m256bh>(to);
}

VISATTN_EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto h = bits_as<Register<float>>(high), l = bits_as<Register<float>>(low);
  Register<uint16_t> to;
  for (int i = 0; i < 16; ++i) {
    to.x[i] = narrow(l.x[i]);
    to.x[i + 16] = narrow(h.x[i]);
  }
  return bits_as<__m512bh>(to);
}

// a * b + c rounded once, of flushed operands. A result is flushed if rounding it with any exponent leaves it under the
// least normal number, which ordinary rounding may just reach: then the same sum, scaled, tells.
VISATTN_EMULATED float multiply_add_flushed(float a, float b, float c) {
  a = flush(a), b = flush(b), c = flush(c);
  const float sum = __builtin_fmaf(a, b, c);
  const float scaled = __builtin_fmaf(a * 0x1p64f, b, c * 0x1p64f);
  const uint32_t bits = bits_as<uint32_t>(sum), size = bits & ~kSign;
  const bool tiny = size < kLeastNormal || (size == kLeastNormal && __builtin_fabsf(scaled) < 0x1p-62f);
  return bits_as<float>(tiny ? bits & kSign : bits);
}

// The odd element first. Of a NaN, which one passes is left open.
VISATTN_EMULATED __m512 dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  auto sum = bits_as<Register<float>>(c);
  const auto x = bits_as<Register<uint32_t>>(a), y = bits_as<Register<uint32_t>>(b);
  for (int i = 0; i < 16; ++i) {
    const uint32_t high = 0xffff0000;
    const float odd = multiply_add_flushed(bits_as<float>(x.x[i] & high), bits_as<float>(y.x[i] & high), sum.x[i]);
    sum.x[i] = multiply_add_flushed(bits_as<float>(x.x[i] << 16), bits_as<float>(y.x[i] << 16), odd);
  }
  return bits_as<__m512>(sum);
}

VISATTN_EMULATED __m512i load_si512(const void* p) {
  if ((uintptr_t)p % 64 != 0) __builtin_trap();  // as the instruction faults
  return read<__m512i>(p, 0);
}

}  // namespace
}  // namespace visattn_emulated

#undef _mm512_max_ps
#define _mm512_max_ps(a, b) ::visattn_emulated::max_ps(a, b)
#undef _mm512_max_pd
#define _mm512_max_pd(a, b) ::visattn_emulated::max_pd(a, b)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) ::visattn_emulated::cmp_ps_mask<(predicate)>(a, b)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, control) ::visattn_emulated::roundscale_ps<(control)>(a)
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(a, control) ::visattn_emulated::reduce_ps<(control)>(a)
#undef _mm512_scalef_ps
#define _mm512_scalef_ps(a, b) ::visattn_emulated::scalef_ps(a, b)
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps(index, base, scale) ::visattn_emulated::i32gather_ps<(scale)>(index, base)
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps(a, b) ::visattn_emulated::unpack<float>(a, b, 0)
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps(a, b) ::visattn_emulated::unpack<float>(a, b, 1)
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd(a, b) ::visattn_emulated::unpack<double>(a, b, 0)
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd(a, b) ::visattn_emulated::unpack<double>(a, b, 1)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, control) ::visattn_emulated::shuffle_f32x4<(control)>(a, b)
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16(index, a) ::visattn_emulated::permutexvar_epi16(index, a)
#undef _mm512_or_si512
#define _mm512_or_si512(a, b) ::visattn_emulated::or_si512(a, b)
#undef _mm512_slli_epi32
#define _mm512_slli_epi32(a, count) ::visattn_emulated::slli_epi32(a, count)
#undef _mm512_set1_epi32
#define _mm512_set1_epi32(a) ::visattn_emulated::set1_epi32(a)
#undef _mm512_setzero_ps
#define _mm512_setzero_ps() ::visattn_emulated::setzero_ps()
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(a) ::visattn_emulated::cvtepu16_epi32(a)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(a) ::visattn_emulated::cvtph_ps(a)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, control) ::visattn_emulated::cvtps_ph<(control)>(a)
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh(a) ::visattn_emulated::cvtneps_pbh(a)
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh(high, low) ::visattn_emulated::cvtne2ps_pbh(high, low)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(c, a, b) ::visattn_emulated::dpbf16_ps(c, a, b)
#undef _mm512_load_si512
#define _mm512_load_si512(p) ::visattn_emulated::load_si512(p)
#undef _mm512_loadu_ps
#define _mm512_loadu_ps(p) ::visattn_emulated::read<__m512>(p, 0)
#undef _mm512_storeu_si512
#define _mm512_storeu_si512(p, a) \
  ::visattn_emulated::write_masked(p, 0xff, ::visattn_emulated::bits_as<::visattn_emulated::Register<uint64_t>>(a))
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, p) \
  ::visattn_emulated::bits_as<__m512>(::visattn_emulated::read_masked<float, 16>(mask, p))
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16(mask, p) \
  ::visattn_emulated::bits_as<__m512i>(::visattn_emulated::read_masked<uint16_t, 32>(mask, p))
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16(mask, p) \
  ::visattn_emulated::bits_as<__m256i>(::visattn_emulated::read_masked<uint16_t, 16>(mask, p))
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps(p, mask, a) \
  ::visattn_emulated::write_masked(p, mask, ::visattn_emulated::bits_as<::visattn_emulated::Register<float>>(a))
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32(p, mask, a) \
  ::visattn_emulated::write_masked(p, mask, ::visattn_emulated::bits_as<::visattn_emulated::Register<uint32_t>>(a))
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16(p, mask, a) \
  ::visattn_emulated::write_masked(p, mask, ::visattn_emulated::bits_as<::visattn_emulated::HalfRegister<uint16_t>>(a))
