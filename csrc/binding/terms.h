// The tensors of terms and of gradients, as the schemas in visattn_kernels/ops.py order them, for every backend's
// operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "check.h"

namespace visattn::binding {

using Term = std::optional<Tensor>;

inline Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor zeros(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

// The tensors of the terms as the schemas order them: DIFFERENTIABLE after q, k and v.
constexpr int kTermTensors = 8;
constexpr int kGradients = 3 + kTermTensors;
constexpr int kKeyBias = 7;
const char* const kTermNames[kTermTensors] = {"relative_bias",    "relative_query_h", "relative_query_w",
                                              "relative_key_h",   "relative_key_w",   "relative_value_h",
                                              "relative_value_w", "key_bias"};

struct Terms {
  const Term* tensors[kTermTensors];
  double query_scale, key_scale;

  // Check the terms against the problem and enter them into the call.
  void enter(Call& call, const Tensor& q, bool with_values) const {
    const Problem& p = call.problem;
    call.vector_scale[kQueryTerm] = query_scale, call.vector_scale[kKeyTerm] = key_scale;
    for (int i = 0; i < kTermTensors; ++i) {
      if (!tensors[i]->has_value()) continue;
      const Tensor& x = **tensors[i];
      const char* name = kTermNames[i];
      if (i == kKeyBias) {
        Sizes sizes{p.batch, p.keys.h, p.keys.w};
        if (x.dim() == 4) sizes.push_back(p.heads);
        check_tensor(x, name, sizes, q.scalar_type(), q);
        call.key_bias = {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.dim() == 4 ? x.stride(3) : 0, 1};
        continue;
      }
      if (p.queries.h != p.keys.h || p.queries.w != p.keys.w)
        fail("query and key grids of one size for a relative term", name,
             "a tensor, queries=" + text({p.queries.h, p.queries.w}) + " and keys=" + text({p.keys.h, p.keys.w}));
      if (i == 0) {
        call.bias = table_of(x, name, p, q, false, table_entries(p.reach(0)), table_entries(p.reach(1)));
        continue;
      }
      const VectorTerm term = VectorTerm((i - 1) / 2);
      const int axis = (i - 1) % 2;
      if (term == kValueTerm && !with_values) fail("no value term where there are no values", name, "a tensor");
      call.vector[term][axis] = table_of(x, name, p, q, x.dim() == 2, table_entries(p.reach(axis)), p.channels(term));
    }
  }

  bool has(int i) const { return tensors[i]->has_value(); }
  const Tensor& operator[](int i) const { return **tensors[i]; }
};

// Check what a forward saved, the incoming gradients, and that what is asked for is there.
inline void check_saved(const Problem& p, const Tensor& q, const Tensor& grad_out, const Tensor& grad_lse,
                        const Tensor& out, const Tensor& lse, const Terms& terms, int64_t needs) {
  const ScalarType dtype = q.scalar_type(), sums = accumulate_dtype(dtype);
  const Sizes queries{p.batch, p.queries.h, p.queries.w, p.heads};
  Sizes outputs = queries;
  outputs.push_back(p.value_dim);
  check_tensor(out, "out", outputs, dtype, q);
  check_tensor(grad_out, "grad_out", outputs, dtype, q);
  check_tensor(lse, "lse", queries, sums, q);
  check_tensor(grad_lse, "grad_lse", queries, sums, q);
  bool legal = needs >= 0 && needs < int64_t(1) << kGradients;
  for (int i = 0; i < kTermTensors; ++i) legal = legal && (!(needs >> (3 + i) & 1) || terms.has(i));
  if (!legal)
    fail("needs to ask for gradients of tensors that are there (bit i for the i-th of q, k, v and the terms)", "needs",
         std::to_string(needs));
}

// A gradient for each that is asked for, an empty tensor for the others.
inline std::vector<Tensor> empty_gradients(const Tensor& q, const Tensor& k, const Tensor& v, const Terms& terms,
                                           int64_t needs) {
  std::vector<Tensor> grads;
  for (int i = 0; i < kGradients; ++i) {
    const Tensor& x = i == 0 ? q : i == 1 ? k : i == 2 ? v : terms.has(i - 3) ? terms[i - 3] : q;
    grads.push_back(empty(q, needs >> i & 1 ? shape(x) : Sizes{0}, q.scalar_type()));
  }
  return grads;
}

// Which tables want gradients, of the passes of queries or of keys: a bias table's comes with that of q, since keys
// outside the map have a part in it.
inline bool of_keys(int slot) { return slot == table_slot(kKeyTerm, 0) || slot == table_slot(kKeyTerm, 1); }

// Where the gradients of tables lie in a share, and how large it is.
inline void lay_out_share(Call& call, const std::vector<int>& slots) {
  const Problem& p = call.problem;
  call.partial_size = 0, call.partials = nullptr;
  for (int64_t& offset : call.partial_offset) offset = -1;
  for (int slot : slots) {
    call.partial_offset[slot] = call.partial_size;
    const int axis = (slot - 1) % 2;
    call.partial_size += slot == 0 ? table_entries(p.reach(0)) * table_entries(p.reach(1))
                                   : table_entries(p.reach(axis)) * p.channels(VectorTerm((slot - 1) / 2));
  }
}

}  // namespace visattn::binding
