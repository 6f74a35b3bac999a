// The engine's inner product against the library's micro-kernel (at::native::cpublas::brgemm), on one thread, at the
// tile sizes that attention has: scores (64 keys x 64 queries, depth D) and sums (Dv x 64 queries, depth 64). Prints
// JSON. `python -m benchmarks products` builds and runs it; it needs AVX-512 with bfloat16.
#define VISATTN_ISA measured
#include "../csrc/cpu/product.h"  // of the engine, compiled for this CPU

#include <ATen/native/CPUBlas.h>

#include <chrono>
#include <cstdio>
#include <vector>

namespace engine = visattn::cpu::measured;
using at::native::cpublas::brgemm;

// Best GFLOP/s of 15 timings of about 20 ms each.
template <class F>
double rate(double flops, F run) {
  const int times = int(2e9 / flops) + 1;
  double best = 1e9;
  for (int i = 0; i < 15; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (int j = 0; j < times; ++j) run();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return flops * times / best / 1e9;
}

int main() {
  constexpr int kLanes = 64;
  const int sizes[][2] = {{49, 8},  {49, 32},  {64, 8}, {64, 32}, {64, 64},
                          {64, 80}, {64, 512}, {8, 64}, {32, 64}, {512, 64}};
  std::printf("[");
  for (const auto& size : sizes) {
    const int rows = size[0], depth = size[1];
    const double flops = 2.0 * rows * depth * kLanes;
    std::vector<float> a(rows * depth, 0.5f), b(depth * kLanes, 0.5f), c(rows * kLanes);
    std::vector<uint32_t> a2(rows * depth / 2, 0x3f003f00), b2(depth / 2 * kLanes, 0x3f003f00);
    auto* ha = reinterpret_cast<const at::BFloat16*>(a2.data());
    auto* hb = reinterpret_cast<const at::BFloat16*>(b2.data());
    const engine::Strides scores{depth, 1}, pairs{depth / 2, 1};
    const double ours = rate(flops, [&] {
      engine::product<engine::Plain<float>, false>(4, a.data(), scores, rows, depth, b.data(), c.data(), 1.f);
    });
    const double library = rate(
        flops, [&] { brgemm(rows, kLanes, depth, depth, kLanes, kLanes, false, a.data(), b.data(), c.data(), false); });
    const double ours_half = rate(flops, [&] {
      engine::product<engine::Pairs, false>(4, a2.data(), pairs, rows, depth / 2, b2.data(), c.data(), 1.f);
    });
    const double library_half =
        rate(flops, [&] { brgemm(rows, kLanes, depth, depth, kLanes, kLanes, false, ha, hb, c.data(), true); });
    std::printf("%s\n  {\"rows\": %d, \"depth\": %d, \"float32\": %.1f, \"float32_brgemm\": %.1f, ",
                &size == sizes ? "" : ",", rows, depth, ours, library);
    std::printf("\"bfloat16\": %.1f, \"bfloat16_brgemm\": %.1f}", ours_half, library_half);
  }
  std::printf("\n]\n");
  at::native::cpublas::brgemm_release(true);
}
