// The operators visattn::cuda_launch_*: tensors to a Call, kernels on the current stream of the tensors' GPU.
//
// The schemas are declared in visattn_kernels/ops.py. Built with VISATTN_EMULATED, the same operators take tensors on
// the CPU and launch on csrc/emulator.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "../cuda/cuda.h"
#include "terms.h"

#ifndef VISATTN_EMULATED
// In every torch with CUDA; its header declares it under a macro of torch's own build.
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace visattn::binding {
namespace {

using cuda::Numbers;
using cuda::Pass;

#ifdef VISATTN_EMULATED
struct Place {
  explicit Place(const Tensor& q) {
    if (!q.is_cpu()) fail("q on the CPU, where kernels are emulated", "q", "a tensor of another device");
  }
  void* stream = nullptr;
};
#else
// The tensors' GPU is the current one while this lives; launches go to its current stream.
struct Place {
  explicit Place(const Tensor& q) : guard(index_of(q)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  }
  static int32_t index_of(const Tensor& q) {
    if (!q.is_cuda()) fail("q on an NVIDIA GPU", "q", "a tensor of another device");
    return q.get_device_index();
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

Numbers numbers_of(const Problem& p, bool tf32) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return tf32 ? Numbers::kTf32 : Numbers::kFloat32;
    case Dtype::kBFloat16:
      return Numbers::kBFloat16;
    case Dtype::kFloat16:
      return Numbers::kFloat16;
    default:
      fail("float32, bfloat16 or float16", "q.dtype", "float64");
  }
}

constexpr int64_t kMostShared = 227 * 1024;  // of a block, on any GPU

cuda::Chosen checked(const Call& call, Pass pass, Numbers numbers) {
  const cuda::Chosen chosen = cuda::choose(call, pass, numbers);
  const Problem& p = call.problem;
  if (!chosen.launch)
    fail("a cell that was compiled", "q.shape",
         text({p.batch, p.queries.h, p.queries.w, p.heads, p.head_dim}) + " with Dv=" + std::to_string(p.value_dim));
  if (chosen.plan.bytes > kMostShared)
    fail("blocks that need at most " + std::to_string(kMostShared) + " bytes of shared memory", "q.shape",
         text({p.queries.h, p.queries.w}) + ", which takes " + std::to_string(chosen.plan.bytes));
  if (int64_t(chosen.plan.box_h) * chosen.plan.box_w >= cuda::kMost)
    fail("fewer than 2^30 positions on the other side of a block", "q.shape",
         text({p.queries.h, p.queries.w}) + " and keys=" + text({p.keys.h, p.keys.w}));
  return chosen;
}

void launch(const Call& call, const cuda::Chosen& chosen, const Place& place) {
  if (const char* const error = chosen.launch(call, chosen.plan, place.stream))
    fail("a launch that the GPU takes (of " + std::to_string(chosen.plan.bytes) + " bytes of shared memory)", "error",
         error);
}

// Run a pass for every part of the pattern.
void run(Call& call, Pass pass, Numbers numbers, const Place& place) {
  if (call.problem.batch > 0)
    for (call.part = 0; call.part < parts(call.problem.pattern); ++call.part)
      launch(call, checked(call, pass, numbers), place);
  call.part = 0;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Term relative_bias, Term relative_query_h,
                                   Term relative_query_w, Term relative_key_h, Term relative_key_w,
                                   Term relative_value_h, Term relative_value_w, Term key_bias, double scale,
                                   double relative_query_scale, double relative_key_scale, std::vector<int64_t> pattern,
                                   bool tf32) {
  const Terms terms{{&relative_bias, &relative_query_h, &relative_query_w, &relative_key_h, &relative_key_w,
                     &relative_value_h, &relative_value_w, &key_bias},
                    relative_query_scale,
                    relative_key_scale};
  const Place place(q);
  Call call;
  const Problem& p = call.problem = problem_of(q, k, &v, scale, pattern);
  terms.enter(call, q, true);
  const Numbers numbers = numbers_of(p, tf32);
  const Sizes outputs{p.batch, p.queries.h, p.queries.w, p.heads, p.value_dim};
  Tensor out = empty(q, outputs, q.scalar_type());
  Tensor lse = empty(q, {p.batch, p.queries.h, p.queries.w, p.heads}, ScalarType::Float);
  call.q = map_of(q), call.k = map_of(k), call.v = map_of(v);
  call.out = map_of(out), call.lse = map_of(lse);
  std::optional<Tensor> sum;
  if (parts(p.pattern) > 1 && p.dtype != Dtype::kFloat32)
    sum = empty(q, outputs, ScalarType::Float), call.sum_out = map_of(*sum);
  run(call, Pass::kForward, numbers, place);
  return {out, lse};
}

// Run a pass of gradients; those of the tables `slots` are sums of the blocks' shares, in their order.
void run_gradients(Call& call, Pass pass, const std::vector<int>& slots, const Tensor& q, std::vector<Tensor>& grads,
                   const Terms& terms, Numbers numbers, const Place& place) {
  const Problem& p = call.problem;
  lay_out_share(call, slots);
  std::optional<Tensor> shares;
  if (!slots.empty()) {
    int64_t deal = 1;
    for (call.part = 0; call.part < parts(p.pattern); ++call.part)
      deal = std::max(deal, checked(call, pass, numbers).plan.deal);
    shares = zeros(q, {deal, p.heads, call.partial_size}, ScalarType::Float);
    call.partials = shares->data_ptr();
  }
  run(call, pass, numbers, place);
  if (!shares) return;
  const std::vector<int64_t> first{0};
  const Tensor sums = torch::stable::sum(*shares, first);  // [heads, partial_size]
  for (int slot : slots) {
    const Sizes sizes = shape(terms[slot]);
    const bool shared = sizes.size() == 2;
    const int64_t entries = sizes[sizes.size() - 2], columns = sizes[sizes.size() - 1];
    Tensor piece = sums;
    piece = torch::stable::narrow(piece, 1, call.partial_offset[slot], entries * columns);
    if (shared) piece = torch::stable::sum(piece, first);
    grads[3 + slot] = torch::stable::to(torch::stable::reshape(piece, sizes), q.scalar_type());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Term relative_bias, Term relative_query_h,
    Term relative_query_w, Term relative_key_h, Term relative_key_w, Term relative_value_h, Term relative_value_w,
    Term key_bias, Tensor out, Tensor lse, double scale, double relative_query_scale, double relative_key_scale,
    std::vector<int64_t> pattern, int64_t needs, bool tf32) {
  const Terms terms{{&relative_bias, &relative_query_h, &relative_query_w, &relative_key_h, &relative_key_w,
                     &relative_value_h, &relative_value_w, &key_bias},
                    relative_query_scale,
                    relative_key_scale};
  const Place place(q);
  Call call;
  const Problem& p = call.problem = problem_of(q, k, &v, scale, pattern);
  terms.enter(call, q, true);
  check_saved(p, q, grad_out, grad_lse, out, lse, terms, needs);
  const Numbers numbers = numbers_of(p, tf32);
  std::vector<Tensor> grads = empty_gradients(q, k, v, terms, needs);
  Tensor delta = empty(q, {p.batch, p.queries.h, p.queries.w, p.heads}, ScalarType::Float);
  call.q = map_of(q), call.k = map_of(k), call.v = map_of(v);
  call.out = map_of(out), call.lse = map_of(lse);
  call.grad_out = map_of(grad_out), call.grad_lse = map_of(grad_lse), call.delta = map_of(delta);
  const auto wants = [&](int i) { return (needs >> i & 1) != 0; };
  if (needs != 0 && p.batch > 0) launch(call, checked(call, Pass::kDelta, numbers), place);

  const bool through_sums = parts(p.pattern) > 1 && p.dtype != Dtype::kFloat32;
  std::vector<Tensor> running;
  const auto sum_of = [&](const Tensor& x) {
    running.push_back(empty(q, shape(x), ScalarType::Float));
    return map_of(running.back());
  };
  Map* const results[3] = {&call.grad_q, &call.grad_k, &call.grad_v};
  Map* const sums[3] = {&call.sum_q, &call.sum_k, &call.sum_v};
  const Tensor* const inputs[3] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) {
    if (!wants(i)) continue;
    *results[i] = map_of(grads[i]);
    if (through_sums) *sums[i] = sum_of(*inputs[i]);
  }
  std::optional<Tensor> bias;
  if (wants(3 + kKeyBias)) {
    bias = empty(q, {p.batch, p.keys.h, p.keys.w, p.heads}, ScalarType::Float);
    call.grad_key_bias = map_of(*bias);
  }
  std::vector<int> query_slots, key_slots;
  for (int slot = 0; slot < kTables; ++slot)
    if (wants(3 + slot)) (of_keys(slot) ? key_slots : query_slots).push_back(slot);
  if (wants(0) || !query_slots.empty())
    run_gradients(call, Pass::kQueries, query_slots, q, grads, terms, numbers, place);
  if (wants(1) || wants(2) || bias || !key_slots.empty())
    run_gradients(call, Pass::kKeys, key_slots, q, grads, terms, numbers, place);
  if (bias) {
    const std::vector<int64_t> heads{3};
    grads[3 + kKeyBias] =
        torch::stable::to(terms[kKeyBias].dim() == 4 ? *bias : torch::stable::sum(*bias, heads), q.scalar_type());
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5],
          grads[6], grads[7], grads[8], grads[9], grads[10]};
}

}  // namespace

#ifdef VISATTN_EMULATED
#define VISATTN_DEVICE_KEY CPU
#else
#define VISATTN_DEVICE_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(visattn, VISATTN_DEVICE_KEY, m) {
  m.impl("cuda_launch_forward", TORCH_BOX(&forward));
  m.impl("cuda_launch_backward", TORCH_BOX(&backward));
}

}  // namespace visattn::binding
