// The operators visattn::cpu_*: tensors to a Call, passes of the engine on torch's threads.
//
// The schemas are declared in visattn_kernels/ops.py.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "../cpu/engine.h"
#include "terms.h"

namespace visattn::binding {
namespace {

using cpu::Pass;

void check_cpu(const Tensor& q) {
  if (!q.is_cpu()) fail("q on the CPU", "q", "a tensor of another device");
}

// Run every item of a pass. Items differ in nothing but place, so threads take the next one as they come.
void run_items(const Call& call, Pass pass, const cpu::Work& work, int threads) {
  const cpu::Engine& engine = cpu::select_engine(call.problem.dtype);
  const int64_t workers = work.items < threads ? work.items : threads;
  if (workers == 0) return;
  const size_t bytes = (size_t(work.scratch_bytes) + 63) / 64 * 64;
  std::unique_ptr<char, decltype(&std::free)> scratch(static_cast<char*>(std::aligned_alloc(64, bytes * workers + 64)),
                                                      &std::free);
  if (!scratch)
    fail("memory for the scratch of " + std::to_string(workers) + " threads", "scratch",
         std::to_string(bytes * workers) + " bytes");
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t item; (item = next.fetch_add(1)) < work.items;)
        engine.run(call, pass, threads, item, scratch.get() + worker * bytes);
  });
}

cpu::Work plan(const Call& call, Pass pass, int threads) {
  return cpu::select_engine(call.problem.dtype).plan(call, pass, threads);
}

// Run a pass for every part of the pattern.
void run(Call& call, Pass pass) {
  const int threads = int(torch::stable::get_num_threads());
  for (call.part = 0; call.part < parts(call.problem.pattern); ++call.part)
    run_items(call, pass, plan(call, pass, threads), threads);
  call.part = 0;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Term relative_bias, Term relative_query_h,
                                   Term relative_query_w, Term relative_key_h, Term relative_key_w,
                                   Term relative_value_h, Term relative_value_w, Term key_bias, double scale,
                                   double relative_query_scale, double relative_key_scale,
                                   std::vector<int64_t> pattern) {
  const Terms terms{{&relative_bias, &relative_query_h, &relative_query_w, &relative_key_h, &relative_key_w,
                     &relative_value_h, &relative_value_w, &key_bias},
                    relative_query_scale,
                    relative_key_scale};
  Call call;
  check_cpu(q);
  const Problem& p = call.problem = problem_of(q, k, &v, scale, pattern);
  terms.enter(call, q, true);
  const ScalarType sums = accumulate_dtype(q.scalar_type());
  const Sizes outputs{p.batch, p.queries.h, p.queries.w, p.heads, p.value_dim};
  Tensor out = empty(q, outputs, q.scalar_type());
  Tensor lse = empty(q, {p.batch, p.queries.h, p.queries.w, p.heads}, sums);
  call.q = map_of(q), call.k = map_of(k), call.v = map_of(v);
  call.out = map_of(out), call.lse = map_of(lse);
  std::optional<Tensor> sum;
  if (parts(p.pattern) > 1 && sums != q.scalar_type()) sum = empty(q, outputs, sums), call.sum_out = map_of(*sum);
  run(call, Pass::kForward);
  return {out, lse};
}

// Sum the shares of the tables' gradients, in their order, into the tensors that want them.
void add_shares(const Call& call, const Tensor& shares, int64_t n, std::vector<Tensor>& grads, const Terms& terms) {
  const bool wide = shares.scalar_type() == ScalarType::Double;
  auto number = [&](int64_t i) {
    return wide ? static_cast<const double*>(shares.data_ptr())[i]
                : double(static_cast<const float*>(shares.data_ptr())[i]);
  };
  for (int slot = 0; slot < kTables; ++slot) {
    if (!call.wants_table(slot)) continue;
    const Sizes sizes = shape(terms[slot]);
    const bool shared = sizes.size() == 2;
    const int64_t entries = sizes[sizes.size() - 2] * sizes[sizes.size() - 1];
    Tensor total = zeros(shares, sizes, ScalarType::Double);
    double* to = static_cast<double*>(total.data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t head = shared ? 0 : i % call.problem.heads;
      const int64_t from = i * call.partial_size + call.partial_offset[slot];
      for (int64_t e = 0; e < entries; ++e) to[head * entries + e] += number(from + e);
    }
    grads[3 + slot] = torch::stable::to(total, grads[3 + slot].scalar_type());
  }
}

// Run a pass of gradients, which sums those of the tables `slots` into shares.
void run_gradients(Call& call, Pass pass, const std::vector<int>& slots, const Tensor& q, std::vector<Tensor>& grads,
                   const Terms& terms) {
  const Problem& p = call.problem;
  const int threads = int(torch::stable::get_num_threads());
  lay_out_share(call, slots);
  int64_t n = 0;
  std::vector<cpu::Work> works;
  for (call.part = 0; call.part < parts(p.pattern); ++call.part) {
    works.push_back(plan(call, pass, threads));
    n += works.back().shares;
  }
  std::optional<Tensor> shares;
  if (!slots.empty()) shares = empty(q, {n, call.partial_size}, accumulate_dtype(q.scalar_type()));
  char* base = shares ? static_cast<char*>(shares->data_ptr()) : nullptr;
  std::vector<int32_t> turns;
  for (call.part = 0; call.part < parts(p.pattern); ++call.part) {
    const cpu::Work& work = works[call.part];
    call.partials = base;
    if (base) base += work.shares * call.partial_size * (p.dtype == Dtype::kFloat64 ? 8 : 4);
    if (pass == Pass::kGradTogether && call.grad_q.data) {
      turns.assign(p.batch * p.heads * cpu::turns(call), 0);
      call.turns = turns.data();
    }
    run_items(call, pass, work, threads);
  }
  call.part = 0;
  if (shares) add_shares(call, *shares, n, grads, terms);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Term relative_bias, Term relative_query_h,
    Term relative_query_w, Term relative_key_h, Term relative_key_w, Term relative_value_h, Term relative_value_w,
    Term key_bias, Tensor out, Tensor lse, double scale, double relative_query_scale, double relative_key_scale,
    std::vector<int64_t> pattern, int64_t needs) {
  const Terms terms{{&relative_bias, &relative_query_h, &relative_query_w, &relative_key_h, &relative_key_w,
                     &relative_value_h, &relative_value_w, &key_bias},
                    relative_query_scale,
                    relative_key_scale};
  Call call;
  check_cpu(q);
  const Problem& p = call.problem = problem_of(q, k, &v, scale, pattern);
  const ScalarType dtype = q.scalar_type(), sums = accumulate_dtype(dtype);
  terms.enter(call, q, true);
  const Sizes queries{p.batch, p.queries.h, p.queries.w, p.heads};
  check_saved(p, q, grad_out, grad_lse, out, lse, terms, needs);

  auto wants = [&](int i) { return (needs >> i & 1) != 0; };
  std::vector<Tensor> grads = empty_gradients(q, k, v, terms, needs);
  Tensor delta = empty(q, queries, sums);
  call.q = map_of(q), call.k = map_of(k), call.v = map_of(v);
  call.out = map_of(out), call.lse = map_of(lse);
  call.grad_out = map_of(grad_out), call.grad_lse = map_of(grad_lse), call.delta = map_of(delta);
  if (needs & ~int64_t(4))
    run_items(call, Pass::kDelta, plan(call, Pass::kDelta, 1), int(torch::stable::get_num_threads()));

  const bool together = cpu::together(call), many = parts(p.pattern) > 1, narrow = dtype != sums;
  std::vector<Tensor> running;
  auto sum_of = [&](const Tensor& x) {
    running.push_back(empty(q, shape(x), sums));
    return map_of(running.back());
  };
  std::vector<int> query_slots, key_slots;
  for (int slot = 0; slot < kTables; ++slot)
    if (wants(3 + slot)) {
      (of_keys(slot) || together ? key_slots : query_slots).push_back(slot);
    }
  if (wants(0)) {
    call.grad_q = map_of(grads[0]);
    if (narrow && (many || together)) call.sum_q = sum_of(q);
  }
  if (wants(1)) {
    call.grad_k = map_of(grads[1]);
    if (narrow && many) call.sum_k = sum_of(k);
  }
  if (wants(2)) {
    call.grad_v = map_of(grads[2]);
    if (narrow && many) call.sum_v = sum_of(v);
  }
  std::optional<Tensor> bias;
  if (wants(3 + kKeyBias)) {
    bias = empty(q, {p.batch, p.keys.h, p.keys.w, p.heads}, sums);
    call.grad_key_bias = map_of(*bias);
  }
  if (!together && (wants(0) || !query_slots.empty()))
    run_gradients(call, Pass::kGradQueries, query_slots, q, grads, terms);
  if ((together && wants(0)) || wants(1) || wants(2) || bias || !key_slots.empty())
    run_gradients(call, together ? Pass::kGradTogether : Pass::kGradKeys, key_slots, q, grads, terms);
  if (bias) {
    const bool per_head = terms[kKeyBias].dim() == 4;
    const std::vector<int64_t> heads{3};
    grads[3 + kKeyBias] = torch::stable::to(per_head ? *bias : torch::stable::sum(*bias, heads), dtype);
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5],
          grads[6], grads[7], grads[8], grads[9], grads[10]};
}

Tensor map(Tensor q, Tensor k, Term relative_bias, Term relative_query_h, Term relative_query_w, Term relative_key_h,
           Term relative_key_w, Term relative_value_h, Term relative_value_w, Term key_bias, Tensor at, double scale,
           double relative_query_scale, double relative_key_scale, std::vector<int64_t> pattern) {
  const Terms terms{{&relative_bias, &relative_query_h, &relative_query_w, &relative_key_h, &relative_key_w,
                     &relative_value_h, &relative_value_w, &key_bias},
                    relative_query_scale,
                    relative_key_scale};
  Call call;
  check_cpu(q);
  const Problem& p = call.problem = problem_of(q, k, nullptr, scale, pattern);
  terms.enter(call, q, false);
  if (!at.is_cpu()) fail("at on the CPU", "at", "a tensor of another device");
  if (at.scalar_type() != ScalarType::Long) fail("at of dtype int64", "at.dtype", name(at.scalar_type()));
  if (at.dim() != 2 || at.size(1) != 2) fail("at of shape [P, 2]", "at.shape", text(shape(at)));
  const int64_t n = at.size(0);
  std::vector<int64_t> points(2 * n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* point = static_cast<const int64_t*>(at.data_ptr()) + i * at.stride(0);
    const int64_t y = point[0], x = point[at.stride(1)];
    if (y < 0 || y >= p.queries.h || x < 0 || x >= p.queries.w)
      fail("points (y, x) of a query grid " + text({p.queries.h, p.queries.w}), "at", text({y, x}));
    points[2 * i] = y, points[2 * i + 1] = x;
  }
  const ScalarType dtype = accumulate_dtype(q.scalar_type());
  Tensor rows = zeros(q, {p.batch, n, p.heads, p.keys.h, p.keys.w}, dtype);
  if (n == 0) return rows;
  Tensor maximum = empty(q, {p.batch, 1, n, p.heads}, dtype), inverse = empty(q, {p.batch, 1, n, p.heads}, dtype);
  call.q = map_of(q), call.k = map_of(k), call.maximum = map_of(maximum), call.inverse = map_of(inverse);
  call.points = points.data(), call.n_points = n;
  run(call, Pass::kStatistics);
  call.weights = {rows.data_ptr(), rows.stride(0), rows.stride(1), 0, rows.stride(2), 1};
  run(call, Pass::kMap);
  return rows;
}

Tensor received(Tensor q, Tensor k, Term relative_bias, Term relative_query_h, Term relative_query_w,
                Term relative_key_h, Term relative_key_w, Term relative_value_h, Term relative_value_w, Term key_bias,
                double scale, double relative_query_scale, double relative_key_scale, std::vector<int64_t> pattern) {
  const Terms terms{{&relative_bias, &relative_query_h, &relative_query_w, &relative_key_h, &relative_key_w,
                     &relative_value_h, &relative_value_w, &key_bias},
                    relative_query_scale,
                    relative_key_scale};
  Call call;
  check_cpu(q);
  const Problem& p = call.problem = problem_of(q, k, nullptr, scale, pattern);
  terms.enter(call, q, false);
  const ScalarType dtype = accumulate_dtype(q.scalar_type());
  Tensor sums = empty(q, {p.batch, p.keys.h, p.keys.w, p.kv_heads}, dtype);
  const Sizes queries{p.batch, p.queries.h, p.queries.w, p.heads};
  Tensor maximum = empty(q, queries, dtype), inverse = empty(q, queries, dtype);
  call.q = map_of(q), call.k = map_of(k), call.maximum = map_of(maximum), call.inverse = map_of(inverse);
  run(call, Pass::kStatistics);
  call.received = map_of(sums);
  run(call, Pass::kReceived);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(visattn, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&forward));
  m.impl("cpu_backward", TORCH_BOX(&backward));
  m.impl("cpu_map", TORCH_BOX(&map));
  m.impl("cpu_received", TORCH_BOX(&received));
}

}  // namespace visattn::binding
