// Backward, from lse: one kernel per tile of queries, for dQ and what belongs to queries, and one per tile of keys, for
// dK, dV and what belongs to keys. Both are the same walk with the sides exchanged:
//
//     near 1 · far 1ᵀ  scores     P  = exp(scores - lse)           queries: near Q, dO   far K, V
//     near 2 · far 2ᵀ  dO · vᵀ    dS = P ∘ (dO·vᵀ - delta)         keys:    near K, V    far Q, dO
//     sums 1 += dS · far 1        dQ or dK
//     sums 2 += P · far 2         dV
//
// A warp owns 16 near positions. Gradients of tables: each block adds to a share of its own (`Call::partials`, one a
// block and head), which are summed afterwards in their order, so that nothing is added atomically and a second run
// gives the same bits. Costs: five products a pair of positions where the forward has two, in two kernels seven.
#pragma once

#include "block.cuh"

namespace visattn::cuda {

template <class C, Pass kPass>
struct Backward : Block<C, kPass> {
  using Base = Block<C, kPass>;
  using Base::call, Base::head, Base::kChunks, Base::kOfKeys, Base::kSlots, Base::kv_head, Base::plan, Base::row,
      Base::rows, Base::tile;
  static constexpr VectorTerm kTerm = kOfKeys ? kKeyTerm : kQueryTerm;

  float sums1[C::kD / 8][4];
  float sums2[kOfKeys ? C::kDv / 8 : 1][4];
  float extra[C::kVectors ? C::kD / 8 : 1][4];  // of sums 1, from its term's tables, without the scale of q·k
  float lse[2], delta[2], bias[2], bias_gradient[2];

  VISATTN_DEVICE Backward(const Args& args, const Tile& t, int64_t h, int64_t kv) : Base(args, t, h, kv) {}

  // A share's row of this head.
  VISATTN_DEVICE float* partials() const {
    const int64_t share = block() / (kOfKeys ? call.problem.kv_heads : call.problem.heads);
    return static_cast<float*>(call.partials) + (share * call.problem.heads + head) * call.partial_size;
  }

  // A careful walk sums dQ, dK and dV anew, and leaves the rest, which no NaN leaks into, as the first one made it.
  VISATTN_DEVICE void clear(bool careful) {
#pragma unroll
    for (auto& four : sums1)
      for (float& x : four) x = 0;
#pragma unroll
    for (auto& four : sums2)
      for (float& x : four) x = 0;
    if (careful) return;
#pragma unroll
    for (auto& four : extra)
      for (float& x : four) x = 0;
  }

  // What belongs to one query head, before its walk: terms, and the rows' own numbers.
  VISATTN_DEVICE void begin_head() {
    for (int r = 0; r < 2; ++r) {
      const Place p = rows[r].place;
      lse[r] = delta[r] = bias[r] = bias_gradient[r] = 0;
      if (p.y == kNowhere) continue;
      if constexpr (!kOfKeys)
        lse[r] = this->lse_of(p), delta[r] = this->delta_of(p);
      else if constexpr (C::kBias)
        bias[r] = call.key_bias.data ? this->key_bias(p) : 0.0f;
    }
    if constexpr (C::kBias) this->load_bias();
    if constexpr (C::kVectors) {
      if constexpr (kOfKeys) {
        this->template look_up_near<C::kD>(kKeyTerm, this->near1());
        this->template keep_table<C::kD>(kQueryTerm);
        this->template keep_table<C::kDv>(kValueTerm);
      } else {
        this->template look_up_near<C::kD>(kQueryTerm, this->near1());
        this->template look_up_near<C::kDv>(kValueTerm, this->near2());
        this->template keep_table<C::kD>(kKeyTerm);
      }
      this->clear_sums(kTerm);
      if constexpr (!kOfKeys) this->clear_sums(kValueTerm);
    }
    if constexpr (C::kBias) {
      if (plan.bias_sums >= 0)
        for (int e = thread(); e < plan.entries_w * plan.entries_h; e += kThreads) shared<float>(plan.bias_sums)[e] = 0;
    }
  }

  VISATTN_DEVICE void step(int stage, int start, bool careful) {
    if constexpr (C::kVectors) {
      bool any = false;
      for (int term = 0; term < kVectorTerms; ++term) any = any || plan.vectors[term].table >= 0;
      if (any) {
        if constexpr (kOfKeys) {
          this->template look_up_far<C::kD>(kQueryTerm, stage, this->far1(stage));
          this->template look_up_far<C::kDv>(kValueTerm, stage, this->far2(stage));
        } else {
          this->template look_up_far<C::kD>(kKeyTerm, stage, this->far1(stage));
        }
        sync_block();
      }
    }
    const uint32_t groups = this->live(stage, start);
    float weights[kChunks][4] = {}, gradients[kChunks][4] = {};
    if (groups != 0) {
      multiply_rows<C, C::kD, kSlots>(weights, this->near1() + 16 * warp() * C::kLd, this->far1(stage), groups);
      multiply_rows<C, C::kDv, kSlots>(gradients, this->near2() + 16 * warp() * C::kLdv, this->far2(stage), groups);
      this->add_terms(weights, stage, start, groups, bias);
      find_gradients(weights, gradients, stage, groups);
      if (C::kMasked && careful) {
        multiply_carefully<C, C::kD, kSlots>(sums1, gradients, this->far1(stage), groups);
        if constexpr (kOfKeys) multiply_carefully<C, C::kDv, kSlots>(sums2, weights, this->far2(stage), groups);
      } else {
        multiply_columns<C, C::kD, kSlots>(sums1, gradients, this->far1(stage), groups);
        if constexpr (kOfKeys) multiply_columns<C, C::kDv, kSlots>(sums2, weights, this->far2(stage), groups);
      }
    }
    if constexpr (C::kBias) {
      if (plan.staged < 0 || careful) return;
      const float same[2] = {1, 1};
      this->stage_weights(gradients, groups);
      sync_warp();
      if constexpr (C::kVectors) this->add_staged(kTerm, start, same);
      if (plan.bias_sums >= 0) {
        sync_block();
        this->add_staged_bias(start);
        sync_block();
      }
      if constexpr (C::kVectors && !kOfKeys) {
        if (plan.vectors[kValueTerm].sums >= 0) {
          this->stage_weights(weights, groups);
          sync_warp();
          this->add_staged(kValueTerm, start, same);
        }
      }
    }
  }

  // Scores to P, dO·vᵀ to dS.
  VISATTN_DEVICE void find_gradients(float (&weights)[kChunks][4], float (&gradients)[kChunks][4], int stage,
                                     uint32_t groups) {
    constexpr float kPower = C::kNatural ? kLog2E : 1.0f;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (!(groups >> (j / 2) & 1)) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * j + 2 * (lane() & 3) + c;
        const float* const numbers = this->far_numbers(stage);
        const float column_lse = kOfKeys ? numbers[column] : 0.0f,
                    column_delta = kOfKeys ? numbers[kSlots + column] : 0.0f;
        Place far{};
        if constexpr (C::kVectors) far = this->far_places(stage)[column];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float &p = weights[j][2 * r + c], &x = gradients[j][2 * r + c];
          const bool none = p == -kInfinity;
          if constexpr (C::kVectors)
            if (!none) x += this->look_up(kValueTerm, r, column, far);
          p = exp2_fast((p - (kOfKeys ? column_lse : lse[r])) * kPower);
          x = p * (x - (kOfKeys ? column_delta : delta[r])) + 0.0f;  // never the mark of an absent pair
          if (none) p = kAbsent, x = kAbsent;
          bias_gradient[r] += x;
        }
      }
    }
  }

  // What belongs to one query head, after its walk.
  VISATTN_DEVICE void end_head() {
    if constexpr (C::kBias) {
      if constexpr (kOfKeys) {
        if (call.grad_key_bias.data)
          for (int r = 0; r < 2; ++r) {
            const float sum = quad_sum(bias_gradient[r]);
            if (rows[r].place.y == kNowhere || (lane() & 3) != 0) continue;
            const Map& m = call.grad_key_bias;
            float& to = static_cast<float*>(m.data)[place_in<false>(m, head, r)];
            to = call.part == 0 ? sum : to + sum;
          }
      }
      if (plan.bias_sums >= 0) {
        float* const to = partials() + call.partial_offset[0];
        for (int e = thread(); e < plan.entries_w * plan.entries_h; e += kThreads)
          to[e] += shared<float>(plan.bias_sums)[e];
      }
    }
    if constexpr (C::kVectors) {
      this->template multiply_entries<C::kD>(kTerm, extra, float(call.vector_scale[kTerm]));
      sync_block();
      if (call.partials) {
        if (plan.vectors[kTerm].sums >= 0)
          this->template add_table_gradient<C::kD>(kTerm, partials(), this->near1(), float(call.vector_scale[kTerm]));
        if constexpr (!kOfKeys)
          if (plan.vectors[kValueTerm].sums >= 0)
            this->template add_table_gradient<C::kDv>(kValueTerm, partials(), this->near2(), 1.0f);
      }
      sync_block();
    }
  }

  template <bool kQueries>
  VISATTN_DEVICE int64_t place_in(const Map& m, int64_t h, int r) const {
    return m.at(tile.batch, h) + offset_of<kQueries>(tile.region, m, rows[r].place);
  }

  template <int kWidth>
  VISATTN_DEVICE void write(const Map& result, const Map& sum, float (&x)[kWidth / 8][4], int64_t h) const {
    if (!result.data) return;
    const bool last = call.last_part(), wide = !last && sizeof(typename C::T) == 2;
    const Map& before = Call::running(sum, result);
    const Map& to = last ? result : before;
    for (int r = 0; r < 2; ++r) {
      if (rows[r].place.y == kNowhere) continue;
      if (call.part > 0) {
        float old[kWidth / 8][4];
        load_sums<kWidth>(old, before.data, place_in<!kOfKeys>(before, h, r), r);
        for (int n = 0; n < kWidth / 8; ++n)
          for (int c = 0; c < 2; ++c) x[n][2 * r + c] += old[n][2 * r + c];
      }
      store_row<C, kWidth>(to.data, place_in<!kOfKeys>(to, h, r), wide, x, r, 1.0f);
    }
  }
};

template <class C, Pass kPass>
VISATTN_KERNEL(kThreads, 1)
backward_kernel(const Args args) {
  using B = Backward<C, kPass>;
  constexpr bool kOfKeys = B::kOfKeys;
  const Problem& p = args.call.problem;
  const int64_t heads = kOfKeys ? p.kv_heads : p.heads, i = block();
  const int64_t near_head = i % heads, items = args.plan.tiles * p.batch;
  Tile* const tile = shared<Tile>(0);
  if (i / heads >= args.plan.deal) return;
  for (int64_t item = i / heads; item < items; item += args.plan.deal) {
    sync_block();
    if (thread() == 0) *tile = tile_of<kOfKeys>(args, item);
    sync_block();
    if (tile->own.h == 0) continue;
    const int64_t first_head = kOfKeys ? near_head * p.group() : near_head;
    B b(args, *tile, first_head, kOfKeys ? near_head : near_head / p.group());
    if (thread() < kNear) b.places()[thread()] = place_of<kOfKeys>(args.plan, *tile, thread());
    sync_block();
    b.find_rows();
    const Map& near1 = kOfKeys ? args.call.k : args.call.q;
    const Map& near2 = kOfKeys ? args.call.v : args.call.grad_out;
    load_near<typename C::T, C::kD, !kOfKeys>(b.near1(), near1, near_head, *tile, b.places(), args.plan.vector[0]);
    load_near<typename C::T, C::kDv, !kOfKeys>(b.near2(), near2, near_head, *tile, b.places(), args.plan.vector[1]);
    copy_commit(), copy_wait<0>();
    for (int careful = 0; careful < 2; ++careful) {
      b.clear(careful);
      for (b.head = first_head; b.head < first_head + (kOfKeys ? p.group() : 1); ++b.head) {
        sync_block();
        b.begin_head();
        b.load_stage(0, 0);
        for (int start = 0, stage = 0; start < tile->count; start += B::kSlots, stage ^= 1) {
          if (start + B::kSlots < tile->count)
            b.load_stage(stage ^ 1, start + B::kSlots);
          else
            copy_commit();
          copy_wait<1>();
          sync_block();
          b.step(stage, start, careful);
          sync_block();
        }
        if (!careful) b.end_head();
      }
      if (!C::kMasked || careful) break;
      if (!sync_block_or(any_not_finite(b.sums1) || any_not_finite(b.sums2))) break;
    }
    const float scale = float(p.scale);
    for (int n = 0; n < C::kD / 8; ++n)
      for (int j = 0; j < 4; ++j) {
        b.sums1[n][j] *= scale;
        if constexpr (C::kVectors) b.sums1[n][j] += b.extra[n][j];
      }
    if constexpr (kOfKeys) {
      b.template write<C::kD>(args.call.grad_k, args.call.sum_k, b.sums1, near_head);
      b.template write<C::kDv>(args.call.grad_v, args.call.sum_v, b.sums2, near_head);
    } else {
      b.template write<C::kD>(args.call.grad_q, args.call.sum_q, b.sums1, near_head);
    }
  }
}

// delta = Σ out · dO - the gradient of lse, of each query and head: what every dP is reduced by. A warp takes a query.
template <class T>
VISATTN_KERNEL(kThreads, 1)
delta_kernel(const Args args) {
  const Call& call = args.call;
  const Problem& p = call.problem;
  const int64_t n = p.batch * p.queries.size() * p.heads, i = block() * kWarps + warp();
  if (i >= n) return;
  const int64_t h = i % p.heads, x = i / p.heads % p.queries.w, y = i / p.heads / p.queries.w % p.queries.h;
  const int64_t b = i / p.heads / p.queries.size();
  const auto at = [&](const Map& m) { return m.at(b, h) + y * m.y + x * m.x; };
  float sum = 0;
  for (int64_t c = lane(); c < p.value_dim; c += 32)
    sum += to_float(static_cast<const T*>(call.out.data)[at(call.out) + c * call.out.channel]) *
           to_float(static_cast<const T*>(call.grad_out.data)[at(call.grad_out) + c * call.grad_out.channel]);
  for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
  if (lane() == 0)
    static_cast<float*>(call.delta.data)[at(call.delta)] =
        sum - static_cast<const float*>(call.grad_lse.data)[at(call.grad_lse)];
}

}  // namespace visattn::cuda
