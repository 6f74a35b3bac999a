// What a kernel asks of the machine: its place in the grid, collectives, copies, conversions, tensor cores, a launch.
//
// The only file with PTX. nvcc compiles each primitive to instructions of sm_80 and later; any other compiler compiles
// it to csrc/emulator, so that the same kernels run on the CPU. No torch.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define VISATTN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define VISATTN_DEVICE __device__ __forceinline__
#else
#include "../emulator/emulator.h"
#define VISATTN_KERNEL(threads, blocks) void
#define VISATTN_DEVICE inline
// The last parameters of a primitive on the host: where the kernel calls it, for the emulator's reports.
#define VISATTN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#endif

namespace visattn::cuda {

constexpr int kWarpLanes = 32;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The bits of a number, and the number of bits.
VISATTN_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
VISATTN_DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A thread's place. The grid is folded by `launch`: a kernel returns from blocks beyond the number that it was asked
// for.
#if defined(__CUDACC__)
VISATTN_DEVICE int thread() { return int(threadIdx.x); }
VISATTN_DEVICE int64_t block() { return blockIdx.x + int64_t(blockIdx.y) * gridDim.x; }
VISATTN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char visattn_shared_memory[];
  return visattn_shared_memory;
}
#else
inline int thread() { return emulator::machine.current->index; }
inline int64_t block() { return emulator::machine.block; }
inline char* shared_memory() { return emulator::machine.shared->begin(); }
#endif
VISATTN_DEVICE int lane() { return thread() % kWarpLanes; }
VISATTN_DEVICE int warp() { return thread() / kWarpLanes; }

// Collectives: every thread of the block, or of the warp, calls them together. A shuffle gives x of another lane.
#if defined(__CUDACC__)
VISATTN_DEVICE void sync_block() { __syncthreads(); }
VISATTN_DEVICE bool sync_block_or(bool predicate) { return __syncthreads_or(predicate); }
VISATTN_DEVICE void sync_warp() { __syncwarp(); }
VISATTN_DEVICE bool warp_any(bool predicate) { return __any_sync(0xffffffff, predicate); }

template <class T>
VISATTN_DEVICE T shuffle(T x, int from_lane) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, uint32_t> || std::is_same_v<T, int>);
  return __shfl_sync(0xffffffff, x, from_lane);
}
template <class T>
VISATTN_DEVICE T shuffle_xor(T x, int mask) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, uint32_t> || std::is_same_v<T, int>);
  return __shfl_xor_sync(0xffffffff, x, mask);
}
#else
inline void sync_block(VISATTN_SITE) { emulator::sync_block({"sync_block", file, line}, false); }
inline bool sync_block_or(bool predicate, VISATTN_SITE) {
  return emulator::sync_block({"sync_block_or", file, line}, predicate);
}
inline void sync_warp(VISATTN_SITE) { emulator::sync_warp({"sync_warp", file, line}); }
inline bool warp_any(bool predicate, VISATTN_SITE) { return emulator::vote_any({"warp_any", file, line}, predicate); }

template <class T>
T shuffle(T x, int from_lane, VISATTN_SITE) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, uint32_t> || std::is_same_v<T, int>);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = emulator::shuffle({"shuffle", file, line}, bits, from_lane);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
T shuffle_xor(T x, int mask, VISATTN_SITE) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, uint32_t> || std::is_same_v<T, int>);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = emulator::shuffle({"shuffle_xor", file, line}, bits, lane() ^ mask);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

// Fragments: registers that hold a small matrix spread over a warp. The layouts are drawn in emulator/arithmetic.h.
//
// ldmatrix loads four matrices of 8 x 8 16-bit numbers; lane 8 i + j names row j of matrix i in shared memory.
// mma adds the product of a 16 x K and a K x 8 matrix to d; K is 16 or 8 for T = Half and BFloat16, and 8 for TF32.
#if defined(__CUDACC__)
VISATTN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

VISATTN_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
VISATTN_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

template <class T>
VISATTN_DEVICE void mma_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <class T>
VISATTN_DEVICE void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  if constexpr (std::is_same_v<T, Half>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
VISATTN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
inline void ldmatrix(uint32_t (&r)[4], const void* row, VISATTN_SITE) {
  emulator::load_matrix({"ldmatrix", file, line}, r, row, false);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row, VISATTN_SITE) {
  emulator::load_matrix({"ldmatrix_transposed", file, line}, r, row, true);
}

template <class T>
constexpr auto kFloatOf = std::is_same_v<T, Half> ? &emulator::float_of_half : &emulator::float_of_bfloat16;

template <class T>
void mma_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, VISATTN_SITE) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  emulator::Product mine{d, a, {b0, b1}};
  emulator::collective({"mma_k16", file, line}, mine, &emulator::Product::run16<16, kFloatOf<T>>);
}
template <class T>
void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, VISATTN_SITE) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  const uint32_t a[2] = {a0, a1};
  emulator::Product mine{d, a, {b0, 0}};
  emulator::collective({"mma_k8", file, line}, mine, &emulator::Product::run16<8, kFloatOf<T>>);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, VISATTN_SITE) {
  emulator::Product mine{d, a, {b0, b1}};
  emulator::collective({"mma_tf32", file, line}, mine, &emulator::Product::run_tf32);
}
#endif

// mma_tf32 with all bits of its float32 operands: multiply-adds in the order of K, on operands that lanes exchange.
VISATTN_DEVICE void mma_fp32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int row = lane() / 4 * 4, column = lane() % 4 * 8;
  for (int half = 0; half < 2; ++half) {
    const uint32_t above = a[2 * half], below = a[2 * half + 1], right = half == 0 ? b0 : b1;
#if defined(__CUDACC__)
#pragma unroll 1  // of hundreds in a kernel, unrolled ones would take minutes to compile
#endif
    for (int k = 0; k < 4; ++k) {
      const float a0 = as_float(shuffle(above, row + k)), a1 = as_float(shuffle(below, row + k));
      const float left_b = as_float(shuffle(right, column + k)), right_b = as_float(shuffle(right, column + 4 + k));
      d[0] = fmaf(a0, left_b, d[0]);
      d[1] = fmaf(a0, right_b, d[1]);
      d[2] = fmaf(a1, left_b, d[2]);
      d[3] = fmaf(a1, right_b, d[3]);
    }
  }
}

// 16 bytes of global memory to shared memory, both aligned to 16, without waiting; zeros if not present, and then
// nothing is read. copy_wait<n> waits for what this thread has committed, but for its last n commits.
#if defined(__CUDACC__)
VISATTN_DEVICE void copy_async(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(present ? 16 : 0)
               : "memory");
}
VISATTN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
VISATTN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
#else
inline void copy_async(void* shared, const void* global, bool present, VISATTN_SITE) {
  emulator::copy_async({"copy_async", file, line}, shared, global, present);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int n>
void copy_wait() {
  emulator::copy_wait(n);
}
#endif

// Conversions, to the nearest and to even of two. NaN stays NaN; what is too large for Half becomes infinite.
template <class T>
VISATTN_DEVICE float to_float(T x) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16> || std::is_same_v<T, float>);
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return as_float(uint32_t(x.bits) << 16);
  } else {
#if defined(__CUDACC__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    return emulator::float_of_half(x.bits);
#endif
  }
}

template <class T>
VISATTN_DEVICE T from_float(float x) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16> || std::is_same_v<T, float>);
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T y;
#if defined(__CUDACC__)
    if constexpr (std::is_same_v<T, Half>)
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    else
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    if constexpr (std::is_same_v<T, Half>)
      y.bits = emulator::half_of_float(x);
    else
      y.bits = emulator::bfloat16_of_float(x);
#endif
    return y;
  }
}

// Two numbers of a fragment's register, the first in the low half.
template <class T>
VISATTN_DEVICE uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
#if defined(__CUDACC__)
  uint32_t both;  // cvt takes the high one first
  if constexpr (std::is_same_v<T, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
#endif
}

// Of two equally near the one farther from zero.
VISATTN_DEVICE uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  return emulator::tf32_of_float(x);
#endif
}

// Approximations; subnormal arguments and results count as zero.
VISATTN_DEVICE float exp2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulator::exp2_flushed(x);
#endif
}

VISATTN_DEVICE float log2_fast(float x) {
#if defined(__CUDACC__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulator::log2_flushed(x);
#endif
}

// A grid of at least so many blocks, and of less than y more: its x side ends at 2^31 - 1, its y side at 65535. {0, 0}
// if there is none.
struct GridSize {
  int64_t x, y;
};

inline GridSize fold(int64_t blocks, int64_t max_x = 0x7fffffff) {
  constexpr int64_t max_y = 65535;
  if (blocks <= 0) return {0, 0};
  const int64_t y = (blocks - 1) / max_x + 1;
  return y > max_y ? GridSize{0, 0} : GridSize{(blocks - 1) / y + 1, y};
}

#if defined(__CUDACC__)
// Lets a kernel have as much shared memory as a block of the current device may. Once for a kernel and device, and
// never the size of one launch: the attribute is the kernel's, and another thread may launch it with another size
// meanwhile.
inline cudaError_t allow_most_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}
#endif

// Starts a kernel on at least so many blocks. Null, or the error's text. No blocks: nothing happens.
#if defined(__CUDACC__)
template <class Args>
const char* launch(void (*kernel)(Args), const Args& args, int64_t blocks, int threads, size_t shared_bytes,
                   void* stream) {
  constexpr size_t shared_unasked = 48 * 1024;
  if (blocks == 0) return nullptr;
  const GridSize grid = fold(blocks);
  if (grid.x == 0 || threads <= 0) return cudaGetErrorString(cudaErrorInvalidConfiguration);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > shared_unasked) error = allow_most_shared(reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) {
    const dim3 blocks_xy(unsigned(grid.x), unsigned(grid.y));
    kernel<<<blocks_xy, unsigned(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
    error = cudaGetLastError();
  } else {
    cudaGetLastError();  // it is reported here, and must not be taken for the next launch's
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
template <class Args>
const char* launch(void (*kernel)(Args), const Args& args, int64_t blocks, int threads, size_t shared_bytes, void*) {
  if (blocks == 0) return nullptr;
  const GridSize grid = fold(blocks, emulator::settings().max_grid_x);
  return emulator::launch(kernel, args, grid.x, grid.y, threads, shared_bytes);
}
#endif

}  // namespace visattn::cuda
