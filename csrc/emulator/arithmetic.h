// What the primitives of csrc/cuda/prims.h compute, on plain numbers and on the registers of 32 lanes, as the PTX ISA
// manual defines them: conversions, and the fragments of ldmatrix and mma.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace visattn::emulator {

constexpr int kLanes = 32;

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

inline float float_of_half(uint16_t half) {
  // Exponent and mantissa in their places of a float, 112 too small in the exponent; the product also normalises.
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  uint32_t bits = as_bits(as_float(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000) bits = magnitude | kInfinity;
  return as_float(bits | uint32_t(half & 0x8000) << 16);
}

inline float float_of_bfloat16(uint16_t bfloat16) { return as_float(uint32_t(bfloat16) << 16); }

inline uint16_t half_of_float(float x) {
  const uint32_t magnitude = as_bits(x) & kMagnitude;
  const uint16_t sign = uint16_t(as_bits(x) >> 16 & 0x8000);
  if (magnitude > kInfinity) return 0x7fff;            // the one NaN that cvt gives
  if (magnitude >= 0x477ff000) return sign | 0x7c00;   // 65520: rounds to 65536
  if (magnitude < 0x38800000) {                        // 2^-14: the result is subnormal
    const float shifted = as_float(magnitude) + 0.5f;  // the last place of 0.5 is that of a subnormal half
    return uint16_t(sign | (as_bits(shifted) - as_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return uint16_t(sign | (rounded - (112u << 23)) >> 13);
}

inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & kMagnitude) > kInfinity) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Ties go away from zero.
inline uint32_t tf32_of_float(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & kMagnitude) > kInfinity) return kMagnitude;
  return (bits & kMagnitude) == kInfinity ? bits : (bits + 0x1000) & ~0x1fffu;
}

// Subnormal numbers become zero.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float exp2_flushed(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2_flushed(float x) { return std::log2(flushed(x)); }

// The operands of one call, of all lanes.
template <class Operands>
class Lanes {
 public:
  explicit Lanes(void* const* lanes) : lanes_(lanes) {}
  Operands& operator[](int lane) const { return *static_cast<Operands*>(lanes_[lane]); }

 private:
  void* const* lanes_;
};

struct LoadMatrix {
  uint32_t* registers;
  const char* row;  // lane 8 i + j: row j of matrix i

  // Lane 4 i + j holds of each matrix the elements (i, 2 j) and (i, 2 j + 1); transposed, (2 j, i) and (2 j + 1, i).
  template <bool transposed>
  static void run(Lanes<LoadMatrix> lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int row = 0; row < 8; ++row) std::memcpy(elements[row], lanes[8 * matrix + row].row, sizeof elements[row]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? elements[j][i] : elements[i][j];
        const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
        lanes[lane].registers[matrix] = low | high << 16;
      }
    }
  }
};

// Four numbers of a row, which a baseline CPU computes with at once.
typedef float Quad __attribute__((vector_size(4 * sizeof(float))));

// D += A B; A is 16 x K, B is K x 8. With i = lane / 4 and j = lane % 4, a lane holds of
//
//     A, 16-bit    (i, 2 j), (i, 2 j + 1)   (i + 8, same)   (i, same + 8)   (i + 8, same + 8)
//     B, 16-bit    (2 j, i), (2 j + 1, i)   (same + 8, i)
//     A, 32-bit    (i, j)   (i + 8, j)   (i, j + 4)   (i + 8, j + 4)
//     B, 32-bit    (j, i)   (j + 4, i)
//     D            (i, 2 j)   (i, 2 j + 1)   (i + 8, 2 j)   (i + 8, 2 j + 1)
//
// in registers that are set off by spaces here; K = 8 of 16-bit numbers has the first half of the registers.
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];

  template <int K, float (*to_float)(uint16_t)>
  static void run16(Lanes<Product> lanes) {
    float a[16][K];
    Quad b[K][2];
    for (int lane = 0; lane < kLanes; ++lane) {
      const Product& of = lanes[lane];
      const int i = lane / 4, j = lane % 4 * 2;
      for (int half = 0; half < 2; ++half)
        for (int k = 0; k < K; k += 8) {
          const int shift = 16 * half;
          a[i][k + j + half] = to_float(uint16_t(of.a[k / 4] >> shift));
          a[i + 8][k + j + half] = to_float(uint16_t(of.a[k / 4 + 1] >> shift));
          b[k + j + half][i / 4][i % 4] = to_float(uint16_t(of.b[k / 8] >> shift));
        }
    }
    multiply<K>(lanes, a, b);
  }

  // The hardware does not look at the 13 bits that TF32 lacks.
  static void run_tf32(Lanes<Product> lanes) {
    float a[16][8];
    Quad b[8][2];
    const auto to_float = [](uint32_t bits) { return as_float(bits & ~0x1fffu); };
    for (int lane = 0; lane < kLanes; ++lane) {
      const Product& of = lanes[lane];
      const int i = lane / 4, j = lane % 4;
      for (int half = 0; half < 2; ++half) {
        a[i][j + 4 * half] = to_float(of.a[2 * half]);
        a[i + 8][j + 4 * half] = to_float(of.a[2 * half + 1]);
        b[j + 4 * half][i / 4][i % 4] = to_float(of.b[half]);
      }
    }
    multiply<8>(lanes, a, b);
  }

 private:
  template <int K>
  static void multiply(Lanes<Product> lanes, const float (&a)[16][K], const Quad (&b)[K][2]) {
    for (int row = 0; row < 16; ++row) {
      float* d[4];
      for (int j = 0; j < 4; ++j) d[j] = lanes[row % 8 * 4 + j].d + row / 8 * 2;
      Quad left{d[0][0], d[0][1], d[1][0], d[1][1]}, right{d[2][0], d[2][1], d[3][0], d[3][1]};
      for (int k = 0; k < K; ++k) {
        left += a[row][k] * b[k][0];
        right += a[row][k] * b[k][1];
      }
      for (int j = 0; j < 2; ++j)
        for (int half = 0; half < 2; ++half) {
          d[j][half] = left[2 * j + half];
          d[j + 2][half] = right[2 * j + half];
        }
    }
  }
};

struct Shuffle {
  uint32_t value, result;
  int from;

  static void run(Lanes<Shuffle> lanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane].result = lanes[lanes[lane].from & (kLanes - 1)].value;
  }
};

struct Vote {
  bool predicate, any;

  static void run(Lanes<Vote> lanes) {
    bool any = false;
    for (int lane = 0; lane < kLanes; ++lane) any |= lanes[lane].predicate;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane].any = any;
  }
};

}  // namespace visattn::emulator
