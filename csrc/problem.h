// What a kernel is asked to do: sizes, strides and pointers. Host and device; no torch.
#pragma once

#include <cstdint>

#include "pattern.h"
#include "terms.h"

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
  VISATTN_HD int64_t reach(int axis) const { return reach_of(pattern, axis, axis ? keys.w : keys.h); }
  VISATTN_HD int64_t channels(VectorTerm term) const { return term == kValueTerm ? value_dim : head_dim; }
};

// One call of any pass. What is not named after q, k, v, out or a table is float32 (float64 for float64 maps).
struct Call {
  Problem problem;
  int part = 0;  // the part of the pattern; sums of a part go on from those of the one before

  Map q, k, v;
  Map out, lse;  // lse and delta have one channel
  Map sum_out;   // out before its last part, where its own dtype is too coarse

  Table bias, vector[kVectorTerms][2];  // relative tables, [term][axis]
  double vector_scale[kVectorTerms] = {1, 1, 1};
  Map key_bias;  // one channel

  Map grad_out, grad_lse, delta;
  Map grad_q, grad_k, grad_v;
  Map sum_q, sum_k, sum_v;   // what becomes grad_q, grad_k and grad_v, shaped like them, channels contiguous
  int32_t* turns = nullptr;  // [B, heads, regions, blocks of queries], zero at first: tiles that have added to sum_q
  Map grad_key_bias;         // one channel, a head each
  void* partials = nullptr;  // [items, heads of an item, partial_size]: shares of the gradients of tables
  int64_t partial_size = 0;
  int64_t partial_offset[kTables] = {-1, -1, -1, -1, -1, -1, -1};  // of each table in a share; -1: not wanted

  Map maximum, inverse;             // of each query's softmax: weights are e^(score - maximum) * inverse
  const int64_t* points = nullptr;  // [n_points, 2], (y, x): the queries of `weights`
  int64_t n_points = 0;
  Map weights;   // [B, points, heads, Hk, Wk]: batch, point (y), head strides; keys are contiguous
  Map received;  // [B, Hk, Wk, kv_heads], one channel

  VISATTN_HD bool last_part() const { return part == parts(problem.pattern) - 1; }
  VISATTN_HD bool has_vector(VectorTerm term) const { return vector[term][0].data || vector[term][1].data; }
  VISATTN_HD bool wants_table(int slot) const { return partial_offset[slot] >= 0; }

  // A tensor that a later part adds to: `sum` where there is one, else the result itself.
  static VISATTN_HD const Map& running(const Map& sum, const Map& result) { return sum.data ? sum : result; }
};

}  // namespace visattn
