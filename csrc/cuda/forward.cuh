// Forward: out = softmax(scores) · (v + value terms), and lse, in one walk over a tile's keys with a running maximum.
//
// A warp owns 16 queries: 16 × kFar scores and 16 × Dv sums in registers. Where all keys of a tile fit one stage, which
// windows of 7 do, nothing is ever rescaled. Costs: D + Dv multiply-adds, an exponential and the mask of a score, and
// per block the reading of its queries and of its box of keys, which blocks that run together share in L2.
#pragma once

#include "block.cuh"

namespace visattn::cuda {

template <class C>
struct Forward : Block<C, Pass::kForward> {
  using Base = Block<C, Pass::kForward>;
  using Base::call, Base::plan, Base::tile, Base::rows, Base::row, Base::kSlots, Base::kChunks;

  float out[C::kDv / 8][4];
  float maximum[2], total[2];

  VISATTN_DEVICE Forward(const Args& args, const Tile& t, int64_t h)
      : Base(args, t, h, h / args.call.problem.group()) {}

  // What goes on from the part before: its out counts as one key of a weight of one, with its lse as its score.
  VISATTN_DEVICE void begin() {
#pragma unroll
    for (int n = 0; n < C::kDv / 8; ++n)
      for (float& x : out[n]) x = 0;
    for (int r = 0; r < 2; ++r) {
      maximum[r] = -kInfinity, total[r] = 0;
      if (call.part == 0 || rows[r].place.y == kNowhere) continue;
      const float before = this->lse_of(rows[r].place);
      if (before == -kInfinity) continue;
      maximum[r] = before, total[r] = 1;
      load_sums<C::kDv>(out, from().data, place_in(from(), r), r);
    }
    if constexpr (C::kVectors) this->clear_sums(kValueTerm);
  }

  VISATTN_DEVICE const Map& from() const { return Call::running(call.sum_out, call.out); }
  VISATTN_DEVICE int64_t place_in(const Map& m, int r) const {
    return m.at(tile.batch, this->head) + offset_of<true>(tile.region, m, rows[r].place);
  }

  VISATTN_DEVICE void step(int stage, int start, bool careful) {
    if constexpr (C::kVectors) {
      if (plan.vectors[kKeyTerm].table >= 0) {
        this->template look_up_far<C::kD>(kKeyTerm, stage, this->far1(stage));
        sync_block();
      }
    }
    const uint32_t groups = this->live(stage, start);
    if (groups == 0) return;
    float scores[kChunks][4] = {};
    multiply_rows<C, C::kD, kSlots>(scores, this->near1() + 16 * warp() * C::kLd, this->far1(stage), groups);
    const float no_bias[2] = {};
    this->add_terms(scores, stage, start, groups, no_bias);

    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = maximum[r];
#pragma unroll
      for (int j = 0; j < kChunks; ++j)
        if (groups >> (j / 2) & 1)
          most = __builtin_fmaxf(most, __builtin_fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
      most = quad_max(most);
      const float base = most == -kInfinity ? 0.0f : most;
      rescale[r] = exp2_fast((maximum[r] - base) * kPower);
      maximum[r] = most;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        if (!(groups >> (j / 2) & 1)) continue;
        for (int c = 0; c < 2; ++c) {
          float& x = scores[j][2 * r + c];
          const bool none = C::kMasked && x == -kInfinity;
          x = exp2_fast((x - base) * kPower);
          sum += x;
          if (none) x = kAbsent;
        }
      }
      total[r] = total[r] * rescale[r] + quad_sum(sum);
    }
#pragma unroll
    for (int n = 0; n < C::kDv / 8; ++n)
      for (int i = 0; i < 4; ++i) out[n][i] *= rescale[i >> 1];
    if (C::kMasked && careful)
      multiply_carefully<C, C::kDv, kSlots>(out, scores, this->far2(stage), groups);
    else
      multiply_columns<C, C::kDv, kSlots>(out, scores, this->far2(stage), groups);
    if constexpr (C::kVectors) {
      if (plan.vectors[kValueTerm].sums >= 0) {
        this->stage_weights(scores, groups);
        sync_warp();
        this->add_staged(kValueTerm, start, rescale);
      }
    }
  }

  VISATTN_DEVICE void write() const {
    const bool last = call.last_part();
    const Map& to = last ? call.out : from();
    for (int r = 0; r < 2; ++r) {
      if (rows[r].place.y == kNowhere) continue;
      const bool none = total[r] == 0;
      store_row<C, C::kDv>(to.data, place_in(to, r), !last && sizeof(typename C::T) == 2, out, r,
                           none ? 0.0f : 1.0f / total[r]);
      if ((lane() & 3) == 0) {
        const float base = maximum[r] == -kInfinity ? 0.0f : maximum[r];
        float lse = base / C::kUnit + log2_fast(total[r]) * kLn2;
        if (none) lse = -kInfinity;
        if (maximum[r] == kInfinity) lse = kInfinity;  // though inf - inf was not a number
        static_cast<float*>(call.lse.data)[place_in(call.lse, r)] = lse;
      }
    }
  }

  // exp(x) = exp2(kPower * x) for a difference of scores.
  static constexpr float kPower = C::kNatural ? kLog2E : 1.0f;
  static constexpr float kLn2 = 0.69314718055994530942f;
};

template <class C>
VISATTN_KERNEL(kThreads, 1)
forward_kernel(const Args args) {
  const int64_t heads = args.call.problem.heads, i = block();
  const int64_t head = i % heads, first = i / heads, items = args.plan.tiles * args.call.problem.batch;
  if (first >= items) return;
  Tile* const tile = shared<Tile>(0);
  if (thread() == 0) *tile = tile_of<false>(args, first);
  sync_block();
  if (tile->count == 0) return;
  Forward<C> f(args, *tile, head);
  if (thread() < kNear) f.places()[thread()] = place_of<false>(args.plan, *tile, thread());
  sync_block();
  f.find_rows();
  load_near<typename C::T, C::kD, true>(f.near1(), args.call.q, head, *tile, f.places(), args.plan.vector[0]);
  if constexpr (C::kBias) f.load_bias();
  if constexpr (C::kVectors) {
    copy_commit(), copy_wait<0>(), sync_block();
    f.template look_up_near<C::kD>(kQueryTerm, f.near1());
    f.template keep_table<C::kD>(kKeyTerm);
  }
  for (int careful = 0; careful < 2; ++careful) {
    f.begin();
    f.load_stage(0, 0);
    for (int start = 0, stage = 0; start < tile->count; start += f.kSlots, stage ^= 1) {
      if (start + f.kSlots < tile->count)
        f.load_stage(stage ^ 1, start + f.kSlots);
      else
        copy_commit();
      copy_wait<1>();
      sync_block();
      f.step(stage, start, careful);
      sync_block();
    }
    if (!C::kMasked || careful || !sync_block_or(any_not_finite(f.out))) break;
  }
  if constexpr (C::kVectors) f.template multiply_entries<C::kDv>(kValueTerm, f.out, 1.0f);
  f.write();
}

}  // namespace visattn::cuda
