// Checks of the tensors that reach an operator. Every entry point repeats what the Python side checked already, since
// torch.ops can be called directly: inconsistent shapes raise, and nothing is read or written out of bounds.
#pragma once

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

inline void check_tensor(const Tensor& x, const char* argument, const Sizes& sizes, ScalarType dtype) {
  if (!x.is_cpu()) fail(std::string(argument) + " on the CPU", argument, "a tensor of another device");
  if (x.layout() != torch::headeronly::Layout::Strided)
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

inline Pattern pattern_of(const Sizes& fields) {
  if (fields.size() != kPatternFields)
    fail(std::to_string(kPatternFields) + " integers for the pattern", "pattern", text(fields));
  if (fields != Sizes(kPatternFields, 0)) fail("the pattern Global, whose integers are 0", "pattern", text(fields));
  return {};  // all zeros
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
  p.pattern = pattern_of(pattern);
  check_tensor(q, "q", shape(q), q.scalar_type());
  check_tensor(k, "k", {p.batch, p.keys.h, p.keys.w, p.kv_heads, p.head_dim}, q.scalar_type());
  if (v) check_tensor(*v, "v", {p.batch, p.keys.h, p.keys.w, p.kv_heads, p.value_dim}, q.scalar_type());
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
  return p;
}

inline void check_no_term(const std::optional<Tensor>& term, const char* argument) {
  if (term.has_value()) fail(std::string("no ") + argument + ", a term that is not there yet", argument, "a tensor");
}

}  // namespace visattn::binding
