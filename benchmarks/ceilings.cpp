// The ceilings of this CPU, measured in registers and in the first cache, all threads at once:
//   fma     float32 multiply-adds, two operations each
//   dot     bfloat16 dot products with float32 sums, where the CPU has them
//   exp2    a degree-5 polynomial with its range reduction: what a softmax can hope for
//
// benchmarks/ceilings.py builds it with -O3 -march=native and reads the JSON that it prints.
// Run by hand: g++ -O3 -march=native -ffp-contract=fast -pthread ceilings.cpp && ./a.out THREADS

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

// Enough independent sums to hide the latency on two ports, few enough to stay in registers (16 with AVX2).
constexpr int kSums = 12;
constexpr int kDotSums = 20;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The compiler must believe that `x` is read and changed here.
template <class T>
void Opaque(T& x) {
  asm volatile("" : "+m"(x)::"memory");
}

// Each block returns the operations it did.
double FmaBlock() {
  constexpr int kSteps = 1 << 16;
  Floats factor = Floats{} + 0.999f, shift = Floats{} + 0.001f;
  Opaque(factor);
  Opaque(shift);
  Floats sums[kSums] = {};
  Opaque(sums);  // equal sums would be computed once
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + shift;
  }
  Opaque(sums);
  return 2.0 * kSteps * kSums * kLanes;
}

double DotBlock() {
#ifdef __AVX512BF16__
  constexpr int kSteps = 1 << 16;
  Ints bits = Ints{} + 0x3f803f80;  // pairs of bfloat16 ones
  Opaque(bits);
  __m512bh ones;
  std::memcpy(&ones, &bits, sizeof ones);
  __m512 sums[kDotSums];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  Opaque(sums);
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 20
    for (int i = 0; i < kDotSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], ones, ones);
  }
  Opaque(sums);
  return 4.0 * kSteps * kDotSums * kLanes;
#else
  return 0;
#endif
}

// 2^x = 2^n p(f), n the nearest integer and |f| <= 1/2. Adding 1.5 * 2^23 rounds, and leaves n in the low bits.
Floats Exp2(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  const Floats high = f * 0.0013333558f + 0.0096181291f;
  const Floats middle = f * 0.0555041087f + 0.2402265070f;
  const Floats low = f * 0.6931471806f + 1.0f;
  const Floats square = f * f;
  const Floats p = (high * square + middle) * square + low;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
}

double Exp2Block() {
  constexpr int kVectors = 256, kSteps = 512;  // 16 KB in, 16 KB out with AVX-512
  static thread_local Floats in[kVectors], out[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) in[i][lane] = -0.01f * static_cast<float>((i * kLanes + lane) % 1000);
  }
  for (int step = 0; step < kSteps; ++step) {
    Opaque(in);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) out[i] = Exp2(in[i]);
    Opaque(out);
  }
  return 1.0 * kSteps * kVectors * kLanes;
}

// Operations per second of all threads together, the best of a few rounds that start together.
double Rate(int threads, double (*block)()) {
  constexpr int kRounds = 5;
  constexpr double kSeconds = 0.05;
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::atomic<int> ready{0};
    std::vector<double> rates(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        block();
        ++ready;
        while (ready < threads) std::this_thread::yield();
        const double start = Now();
        double done = 0, seconds = 0;
        while (seconds < kSeconds) {
          done += block();
          seconds = Now() - start;
        }
        rates[t] = done / seconds;
      });
    }
    for (auto& thread : pool) thread.join();
    double total = 0;
    for (double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::printf("{\"threads\": %d, \"vector_bytes\": %d", threads, kVectorBytes);
  std::printf(", \"fma\": %.6g", Rate(threads, FmaBlock));
  std::printf(", \"dot\": %.6g", Rate(threads, DotBlock));
  std::printf(", \"exp2\": %.6g", Rate(threads, Exp2Block));
  std::printf("}\n");
}
