// The operators visattn::cpu_*: tensors to a Call, passes of the engine on torch's threads.
//
// The schemas are declared in visattn_kernels/ops.py.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "../cpu/engine.h"
#include "check.h"

namespace visattn::binding {
namespace {

using cpu::Pass;
using Term = std::optional<Tensor>;

// Run every item of a pass. Items differ in nothing but place, so threads take the next one as they come.
void run(const Call& call, Pass pass) {
  const cpu::Engine& engine = cpu::select_engine(call.problem.dtype);
  const int threads = int(torch::stable::get_num_threads());
  const cpu::Work work = engine.plan(call, pass, threads);
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

Tensor empty(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

struct Terms {
  const Term &relative_bias, &relative_query_h, &relative_query_w, &relative_key_h, &relative_key_w, &relative_value_h,
      &relative_value_w, &key_bias;

  void check() const {
    check_no_term(relative_bias, "relative_bias");
    check_no_term(relative_query_h, "relative_query_h");
    check_no_term(relative_query_w, "relative_query_w");
    check_no_term(relative_key_h, "relative_key_h");
    check_no_term(relative_key_w, "relative_key_w");
    check_no_term(relative_value_h, "relative_value_h");
    check_no_term(relative_value_w, "relative_value_w");
    check_no_term(key_bias, "key_bias");
  }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Term relative_bias, Term relative_query_h,
                                   Term relative_query_w, Term relative_key_h, Term relative_key_w,
                                   Term relative_value_h, Term relative_value_w, Term key_bias, double scale,
                                   double /*relative_query_scale*/, double /*relative_key_scale*/,
                                   std::vector<int64_t> pattern) {
  Terms{relative_bias,  relative_query_h, relative_query_w, relative_key_h,
        relative_key_w, relative_value_h, relative_value_w, key_bias}
      .check();
  Call call;
  const Problem& p = call.problem = problem_of(q, k, &v, scale, pattern);
  Tensor out = empty(q, {p.batch, p.queries.h, p.queries.w, p.heads, p.value_dim}, q.scalar_type());
  Tensor lse = empty(q, {p.batch, p.queries.h, p.queries.w, p.heads}, accumulate_dtype(q.scalar_type()));
  call.q = map_of(q), call.k = map_of(k), call.v = map_of(v);
  call.out = map_of(out), call.lse = map_of(lse);
  run(call, Pass::kForward);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Term relative_bias, Term relative_query_h,
    Term relative_query_w, Term relative_key_h, Term relative_key_w, Term relative_value_h, Term relative_value_w,
    Term key_bias, Tensor out, Tensor lse, double scale, double /*relative_query_scale*/, double /*relative_key_scale*/,
    std::vector<int64_t> pattern, int64_t needs) {
  Terms{relative_bias,  relative_query_h, relative_query_w, relative_key_h,
        relative_key_w, relative_value_h, relative_value_w, key_bias}
      .check();
  Call call;
  const Problem& p = call.problem = problem_of(q, k, &v, scale, pattern);
  const ScalarType dtype = q.scalar_type(), sums = accumulate_dtype(dtype);
  const Sizes queries{p.batch, p.queries.h, p.queries.w, p.heads};
  Sizes outputs = queries;
  outputs.push_back(p.value_dim);
  check_tensor(out, "out", outputs, dtype);
  check_tensor(grad_out, "grad_out", outputs, dtype);
  check_tensor(lse, "lse", queries, sums);
  check_tensor(grad_lse, "grad_lse", queries, sums);
  if (needs < 0 || needs >= 8)
    fail("needs to ask for gradients of q, k and v (bits 0 to 2)", "needs", std::to_string(needs));

  auto wanted = [&](const Tensor& x, int bit) { return empty(q, needs >> bit & 1 ? shape(x) : Sizes{0}, dtype); };
  auto none = [&] { return empty(q, Sizes{0}, dtype); };
  Tensor grad_q = wanted(q, 0), grad_k = wanted(k, 1), grad_v = wanted(v, 2);
  Tensor delta = empty(q, queries, sums);
  call.q = map_of(q), call.k = map_of(k), call.v = map_of(v);
  call.out = map_of(out), call.lse = map_of(lse);
  call.grad_out = map_of(grad_out), call.grad_lse = map_of(grad_lse), call.delta = map_of(delta);
  if (needs & 3) run(call, Pass::kDelta);
  std::vector<int32_t> turns;
  Tensor running_q = grad_q;  // in its own dtype where that is the dtype of sums
  if (needs & 1) {
    turns.resize(p.batch * p.heads * ((p.queries.size() + cpu::kBlock - 1) / cpu::kBlock));
    if (dtype != sums) running_q = empty(q, shape(q), sums);
    call.grad_q = map_of(grad_q), call.running_q = map_of(running_q), call.turns = turns.data();
  }
  if (needs & 2) call.grad_k = map_of(grad_k);
  if (needs & 4) call.grad_v = map_of(grad_v);
  if (needs & 7) run(call, Pass::kBackward);
  return {grad_q, grad_k, grad_v, none(), none(), none(), none(), none(), none(), none(), none()};
}

Tensor map(Tensor q, Tensor k, Term relative_bias, Term relative_query_h, Term relative_query_w, Term relative_key_h,
           Term relative_key_w, Term relative_value_h, Term relative_value_w, Term key_bias, Tensor at, double scale,
           double /*relative_query_scale*/, double /*relative_key_scale*/, std::vector<int64_t> pattern) {
  Terms{relative_bias,  relative_query_h, relative_query_w, relative_key_h,
        relative_key_w, relative_value_h, relative_value_w, key_bias}
      .check();
  Call call;
  const Problem& p = call.problem = problem_of(q, k, nullptr, scale, pattern);
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
  Tensor rows = empty(q, {p.batch, n, p.heads, p.keys.h, p.keys.w}, dtype);
  if (n == 0) return rows;
  Tensor maximum = empty(q, {p.batch, 1, n, p.heads}, dtype), inverse = empty(q, {p.batch, 1, n, p.heads}, dtype);
  call.q = map_of(q), call.k = map_of(k), call.maximum = map_of(maximum), call.inverse = map_of(inverse);
  call.points = points.data(), call.n_points = n;
  run(call, Pass::kStatistics);
  call.weights = {rows.data_ptr(), rows.stride(0), 0, rows.stride(1), rows.stride(2), 1};
  run(call, Pass::kMap);
  return rows;
}

Tensor received(Tensor q, Tensor k, Term relative_bias, Term relative_query_h, Term relative_query_w,
                Term relative_key_h, Term relative_key_w, Term relative_value_h, Term relative_value_w, Term key_bias,
                double scale, double /*relative_query_scale*/, double /*relative_key_scale*/,
                std::vector<int64_t> pattern) {
  Terms{relative_bias,  relative_query_h, relative_query_w, relative_key_h,
        relative_key_w, relative_value_h, relative_value_w, key_bias}
      .check();
  Call call;
  const Problem& p = call.problem = problem_of(q, k, nullptr, scale, pattern);
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
