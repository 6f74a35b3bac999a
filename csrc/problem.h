// What a kernel is asked to do: sizes, strides and pointers. Host and device; no torch.
#pragma once

#include <cstdint>

#include "pattern.h"

namespace visattn {

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A tensor [B, H, W, heads, channels] of any strides, which count elements. Null where a call has no such tensor.
struct Map {
  void* data = nullptr;
  int64_t batch = 0, y = 0, x = 0, head = 0, channel = 0;

  VISATTN_HD int64_t at(int64_t b, int64_t h) const { return b * batch + h * head; }
};

struct Problem {
  Dtype dtype;
  int64_t batch;
  Grid queries, keys;
  int64_t heads, kv_heads;
  int64_t head_dim, value_dim;
  double scale;
  Pattern pattern;

  VISATTN_HD int64_t group() const { return heads / kv_heads; }
};

// One call of any pass. What is not named after q, k, v or out is float32 (float64 for float64 maps).
struct Call {
  Problem problem;
  Map q, k, v;
  Map out, lse;  // lse and delta have one channel
  Map grad_out, grad_lse, delta;
  Map grad_q, grad_k, grad_v;
  Map running_q;             // the sum that becomes grad_q, shaped like it, channels contiguous
  int32_t* turns = nullptr;  // [B, heads, blocks of queries], zero at first: how many tiles have added to running_q
  Map maximum, inverse;      // of each query's softmax: weights are 2^(score - maximum) * inverse
  const int64_t* points = nullptr;  // [n_points, 2], (y, x): the queries of `weights`
  int64_t n_points = 0;
  Map weights;   // [B, points, heads, Hk, Wk]: x counts points, keys are contiguous
  Map received;  // [B, Hk, Wk, kv_heads], one channel

  // The queries of a call are a list of points, or else the whole grid in raster order.
  VISATTN_HD int64_t n_queries() const { return points ? n_points : problem.queries.size(); }
};

}  // namespace visattn
