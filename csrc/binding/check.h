// Checks of the tensors that reach an operator. Every entry point repeats what the Python side checked already, since
// torch.ops can be called directly: inconsistent shapes raise, and nothing is read or written out of bounds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../problem.h"

namespace visattn::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kMaxChannels = 65536;  // as in visattn_kernels/backends/cpu.py: scratch memory grows with D and Dv

[[noreturn]] inline void fail(const std::string& rule, const std::string& argument, const std::string& value) {
  throw std::runtime_error("visattn: expected " + rule + ", but got " + argument + "=" + value);
}

inline std::string text(const Sizes& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

inline Sizes shape(const Tensor& x) {
  Sizes sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  return sizes;
}

inline const char* name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return "another dtype";
  }
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `q` is what was looked at first: all others lie where it does.
inline void check_tensor(const Tensor& x, const char* argument, const Sizes& sizes, ScalarType dtype, const Tensor& q) {
  if (x.is_cpu() != q.is_cpu() || x.is_cuda() != q.is_cuda() || x.get_device_index() != q.get_device_index())
    fail(std::string(argument) + (q.is_cpu() ? " on the CPU" : " on the GPU of q"), argument,
         "a tensor of another device");
  int32_t layout = 0;  // torch's C++ interface tells it from 2.11 on
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  if (layout != aoti_torch_layout_strided())
    fail(std::string(argument) + " to be a strided (dense) tensor", argument, "another layout");
  if (x.scalar_type() != dtype)
    fail(std::string(argument) + " of dtype " + name(dtype), std::string(argument) + ".dtype", name(x.scalar_type()));
  if (shape(x) != sizes)
    fail(std::string(argument) + " of shape " + text(sizes), std::string(argument) + ".shape", text(shape(x)));
}

// The strides of a map [B, H, W, heads, channels]; of one with no channels, [B, H, W, heads], where `x` has four
// dimensions.
inline Map map_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.dim() == 5 ? x.stride(4) : 1};
}

inline Dtype dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail("float64, float32, bfloat16 or float16", "q.dtype", name(q.scalar_type()));
  }
}

inline void check_range(const char* field, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    fail(std::string("the pattern's ") + field + " in [" + std::to_string(least) + ", " + std::to_string(most) + "]",
         field, std::to_string(value));
}

// The pattern of the integers of visattn_kernels/patterns.py, checked against the grids.
inline Pattern pattern_of(const Sizes& fields, const Grid& queries, const Grid& keys) {
  if (fields.size() != kPatternFields)
    fail(std::to_string(kPatternFields) + " integers for the pattern", "pattern", text(fields));
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  check_range("kind", fields[0], 0, int64_t(PatternKind::kCrissCross));
  const Pattern p{PatternKind(fields[0]),
                  fields[1],
                  fields[2],
                  fields[3],
                  fields[4],
                  fields[5],
                  fields[6],
                  fields[7],
                  fields[8],
                  fields[9]};
  const bool window = p.kind == PatternKind::kWindow, neighborhood = p.kind == PatternKind::kNeighborhood;
  const bool sized = window || neighborhood || p.kind == PatternKind::kGrid;
  const bool row = p.kind == PatternKind::kRow, column = p.kind == PatternKind::kColumn;
  check_range("size_h", p.size_h, sized, sized || column ? kMost : 0);
  check_range("size_w", p.size_w, sized, sized || row ? kMost : 0);
  check_range("step_h", p.step_h, neighborhood, neighborhood ? kMost : 0);
  check_range("step_w", p.step_w, neighborhood, neighborhood ? kMost : 0);
  check_range("shift_h", p.shift_h, 0, window ? p.size_h - 1 : 0);
  check_range("shift_w", p.shift_w, 0, window ? p.size_w - 1 : 0);
  check_range("border", p.border, 0, neighborhood ? int64_t(Border::kZero) : 0);
  check_range("causal_h", p.causal_h, 0, neighborhood);
  check_range("causal_w", p.causal_w, 0, neighborhood);
  if ((row && p.size_w > 0 && p.size_w % 2 == 0) || (column && p.size_h > 0 && p.size_h % 2 == 0))
    fail("an odd span", "pattern", text(fields));
  if (p.kind != PatternKind::kGlobal && (queries.h != keys.h || queries.w != keys.w))
    fail("query and key grids of one size for a local pattern", "keys",
         text({keys.h, keys.w}) + " and queries=" + text({queries.h, queries.w}));
  if (neighborhood && Border(p.border) == Border::kShift) {
    if (p.size_h > queries.h / p.step_h) fail("kernel * dilation <= height", "size_h", std::to_string(p.size_h));
    if (p.size_w > queries.w / p.step_w) fail("kernel * dilation <= width", "size_w", std::to_string(p.size_w));
  }
  return p;
}

// Check q, k and (if given) v against each other and describe the problem.
inline Problem problem_of(const Tensor& q, const Tensor& k, const Tensor* v, double scale, const Sizes& pattern) {
  for (auto [x, argument] : {std::pair{&q, "q"}, {&k, "k"}, {v, "v"}})
    if (x && x->dim() != 5)
      fail(std::string(argument) + " of shape [B, H, W, heads, D]", std::string(argument) + ".shape", text(shape(*x)));
  Problem p{};
  p.dtype = dtype_of(q);
  p.batch = q.size(0);
  p.queries = {q.size(1), q.size(2)};
  p.keys = {k.size(1), k.size(2)};
  p.heads = q.size(3);
  p.kv_heads = k.size(3);
  p.head_dim = q.size(4);
  p.value_dim = v ? v->size(4) : 0;
  p.scale = scale;
  check_tensor(q, "q", shape(q), q.scalar_type(), q);
  check_tensor(k, "k", {p.batch, p.keys.h, p.keys.w, p.kv_heads, p.head_dim}, q.scalar_type(), q);
  if (v) check_tensor(*v, "v", {p.batch, p.keys.h, p.keys.w, p.kv_heads, p.value_dim}, q.scalar_type(), q);
  for (int64_t size : {p.queries.h, p.queries.w, p.keys.h, p.keys.w, p.heads, p.kv_heads, p.head_dim})
    if (size < 1)
      fail("every size but the batch to be at least 1", "q.shape", text(shape(q)) + " and k.shape=" + text(shape(k)));
  if (v && p.value_dim < 1) fail("every size but the batch to be at least 1", "v.shape", text(shape(*v)));
  // Beyond these, products of sizes would leave 64 bits; no tensor with storage of its own reaches them.
  for (int64_t size : {p.queries.h, p.queries.w, p.keys.h, p.keys.w, p.heads, p.kv_heads})
    if (size >= int64_t(1) << 31)
      fail("every side of a grid and every number of heads below 2^31", "q.shape",
           text(shape(q)) + " and k.shape=" + text(shape(k)));
  if (p.head_dim > kMaxChannels) fail("D of at most " + std::to_string(kMaxChannels), "q.shape", text(shape(q)));
  if (p.value_dim > kMaxChannels) fail("Dv of at most " + std::to_string(kMaxChannels), "v.shape", text(shape(*v)));
  if (p.heads % p.kv_heads != 0)
    fail("the heads of k to divide the heads of q", "q.shape", text(shape(q)) + " and k.shape=" + text(shape(k)));
  p.pattern = pattern_of(pattern, p.queries, p.keys);
  return p;
}

// A relative table [entries, columns] or [heads, entries, columns]; of the bias, always the latter.
inline Table table_of(const Tensor& x, const char* argument, const Problem& p, const Tensor& q, bool shared,
                      int64_t entries, int64_t columns) {
  check_tensor(x, argument, shared ? Sizes{entries, columns} : Sizes{p.heads, entries, columns}, q.scalar_type(), q);
  if (shared) return {x.data_ptr(), 0, x.stride(0), x.stride(1)};
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

}  // namespace visattn::binding
