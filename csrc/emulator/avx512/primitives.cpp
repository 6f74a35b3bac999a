// Each intrinsic of this folder's <immintrin.h> as a function of memory, so that a test can call it. Compiled on the
// emulation or, with the compiler's own header and flags, on the instructions.
#include <immintrin.h>

#include <cstdint>

namespace {

template <class V>
V get(const void* from) {
  V x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
void put(void* to, V x) {
  __builtin_memcpy(to, &x, sizeof x);
}

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

}  // namespace

// run_mm512_...: registers are given by their bytes; `out` has room for one.
#define PRIMITIVE(NAME, ...)                                                                             \
  extern "C" void run##NAME([[maybe_unused]] const void* a, [[maybe_unused]] const void* b,              \
                            [[maybe_unused]] const void* c, [[maybe_unused]] uint32_t mask, void* out) { \
    __VA_ARGS__;                                                                                         \
  }

#define F(X) get<__m512>(X)
#define D(X) get<__m512d>(X)
#define I(X) get<__m512i>(X)

PRIMITIVE(_mm512_max_ps, put(out, _mm512_max_ps(F(a), F(b))))
PRIMITIVE(_mm512_max_pd, put(out, _mm512_max_pd(D(a), D(b))))
PRIMITIVE(_mm512_cmp_ps_mask, put(out, _mm512_cmp_ps_mask(F(a), F(b), _CMP_NEQ_UQ)))
PRIMITIVE(_mm512_roundscale_ps, put(out, _mm512_roundscale_ps(F(a), kNearest)))
PRIMITIVE(_mm512_reduce_ps, put(out, _mm512_reduce_ps(F(a), kNearest)))
PRIMITIVE(_mm512_scalef_ps, put(out, _mm512_scalef_ps(F(a), F(b))))
PRIMITIVE(_mm512_i32gather_ps, put(out, _mm512_i32gather_ps(I(a), b, 4)))
PRIMITIVE(_mm512_unpacklo_ps, put(out, _mm512_unpacklo_ps(F(a), F(b))))
PRIMITIVE(_mm512_unpackhi_ps, put(out, _mm512_unpackhi_ps(F(a), F(b))))
PRIMITIVE(_mm512_unpacklo_pd, put(out, _mm512_unpacklo_pd(D(a), D(b))))
PRIMITIVE(_mm512_unpackhi_pd, put(out, _mm512_unpackhi_pd(D(a), D(b))))
PRIMITIVE(
    _mm512_shuffle_f32x4, switch (mask) {
      case 0x88:
        return put(out, _mm512_shuffle_f32x4(F(a), F(b), 0x88));
      case 0xdd:
        return put(out, _mm512_shuffle_f32x4(F(a), F(b), 0xdd));
      default:
        return put(out, _mm512_shuffle_f32x4(F(a), F(b), 0x1b));
    })
PRIMITIVE(_mm512_permutexvar_epi16, put(out, _mm512_permutexvar_epi16(I(a), I(b))))
PRIMITIVE(_mm512_or_si512, put(out, _mm512_or_si512(I(a), I(b))))
PRIMITIVE(_mm512_slli_epi32, put(out, _mm512_slli_epi32(I(a), mask)))
PRIMITIVE(_mm512_set1_epi32, put(out, _mm512_set1_epi32(get<int>(a))))
PRIMITIVE(_mm512_setzero_ps, put(out, _mm512_setzero_ps()))
PRIMITIVE(_mm512_cvtepu16_epi32, put(out, _mm512_cvtepu16_epi32(get<__m256i>(a))))
PRIMITIVE(_mm512_cvtph_ps, put(out, _mm512_cvtph_ps(get<__m256i>(a))))
PRIMITIVE(_mm512_cvtps_ph, put(out, _mm512_cvtps_ph(F(a), kNearest)))
PRIMITIVE(_mm512_load_si512, put(out, _mm512_load_si512(a)))
PRIMITIVE(_mm512_loadu_ps, put(out, _mm512_loadu_ps(a)))
PRIMITIVE(_mm512_maskz_loadu_ps, put(out, _mm512_maskz_loadu_ps(__mmask16(mask), a)))
PRIMITIVE(_mm512_maskz_loadu_epi16, put(out, _mm512_maskz_loadu_epi16(__mmask32(mask), a)))
PRIMITIVE(_mm256_maskz_loadu_epi16, put(out, _mm256_maskz_loadu_epi16(__mmask16(mask), a)))
PRIMITIVE(_mm512_storeu_si512, _mm512_storeu_si512(out, I(a)))
PRIMITIVE(_mm512_mask_storeu_ps, _mm512_mask_storeu_ps(out, __mmask16(mask), F(a)))
PRIMITIVE(_mm512_mask_storeu_epi32, _mm512_mask_storeu_epi32(out, __mmask16(mask), I(a)))
PRIMITIVE(_mm256_mask_storeu_epi16, _mm256_mask_storeu_epi16(out, __mmask16(mask), get<__m256i>(a)))
PRIMITIVE(_mm512_cvtneps_pbh, put(out, _mm512_cvtneps_pbh(F(a))))
PRIMITIVE(_mm512_cvtne2ps_pbh, put(out, _mm512_cvtne2ps_pbh(F(a), F(b))))
PRIMITIVE(_mm512_dpbf16_ps, put(out, _mm512_dpbf16_ps(F(a), get<__m512bh>(b), get<__m512bh>(c))))

// Whether this CPU has the instructions. To be asked of the emulation's build, which any CPU can run.
extern "C" int supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
extern "C" int supports_avx512_bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }
