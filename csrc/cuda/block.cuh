// A block at work on one tile: its stages, which pairs there are, what the terms add to their scores.
//
// Relative vector tables enter as numbers computed once: rows·entries, 16 rows at a time by mma.sync, kept in shared
// memory by the other side's coordinate (`lookup`), so that a score takes one number from each axis. What the other way
// falls on an offset (`sums`) is summed over the other side's rows or columns, from scores staged in shared memory, in
// a fixed order; a product with the table, or with the rows, ends it. Nothing is added atomically.
#pragma once

#include "engine.cuh"

namespace visattn::cuda {

// A row of a lane: rows g and g + 8 of its warp.
struct Row {
  Place place;
  int first_y, count_y, first_x, count_x;  // what it sees of the far side; nothing if there is no such row
};

// Offsets (key minus query) of an axis that a tile meets.
struct Span {
  int first, count;
};

template <class C, Pass kPass>
struct Block {
  using T = typename C::T;
  static constexpr bool kOfKeys = kPass == Pass::kKeys;
  static constexpr bool kBackward = kPass != Pass::kForward;
  static constexpr int kSlots = kFar<C, kPass>, kChunks = kSlots / 8, kPerRow = kThreads / kSlots;
  static constexpr int kStagedLd = kSlots + 1;

  const Args& args;
  const Call& call;
  const Plan& plan;
  const Tile& tile;
  int64_t head, kv_head;  // of queries; of keys
  Row rows[2];
  int reach_y, reach_x;  // of the warp: far rows [reach_y, reach_y + reach_h)
  int reach_h;

  VISATTN_DEVICE Block(const Args& a, const Tile& t, int64_t h, int64_t kv)
      : args(a), call(a.call), plan(a.plan), tile(t), head(h), kv_head(kv) {}

  VISATTN_DEVICE Place* places() const { return shared<Place>(plan.places); }
  VISATTN_DEVICE T* near1() const { return shared<T>(plan.near1); }
  VISATTN_DEVICE T* near2() const { return shared<T>(plan.near2); }
  VISATTN_DEVICE T* far1(int stage) const { return shared<T>(plan.stages + stage * plan.stage_bytes); }
  VISATTN_DEVICE T* far2(int stage) const { return shared<T>(plan.stages + stage * plan.stage_bytes + plan.far2); }
  VISATTN_DEVICE Place* far_places(int stage) const {
    return shared<Place>(plan.stages + stage * plan.stage_bytes + plan.far_places);
  }
  // Queries of the forward and of dQ meet key biases [kSlots]; keys meet lse and delta of queries [2][kSlots].
  VISATTN_DEVICE float* far_numbers(int stage) const {
    return shared<float>(plan.stages + stage * plan.stage_bytes + plan.far_numbers);
  }
  VISATTN_DEVICE float* staged() const { return shared<float>(plan.staged); }

  // Rows of this lane in the block.
  VISATTN_DEVICE int row(int r) const { return 16 * warp() + (lane() >> 2) + 8 * r; }

  VISATTN_DEVICE float key_bias(Place key) const {
    const Map& m = call.key_bias;
    return to_float(static_cast<const T*>(m.data)[m.at(tile.batch, head) + offset_of<false>(tile.region, m, key)]);
  }

  VISATTN_DEVICE bool on_map(Place p) const {
    const Grid grid = kOfKeys ? tile.region.queries() : tile.region.keys();
    return p.y >= 0 && p.y < grid.h && p.x >= 0 && p.x < grid.w;
  }

  // Positions and ranges of the lane's rows. `places` of the block must be there.
  VISATTN_DEVICE void find_rows() {
    const int64_t n_y = tile.region.key_y.count, n_x = tile.region.key_x.count;
    int first = 1 << 30, end = -(1 << 30);
    for (int r = 0; r < 2; ++r) {
      const Place p = places()[row(r)];
      rows[r] = {p, 0, 0, 0, 0};
      if (p.y == kNowhere) continue;
      const Range y = kOfKeys ? tile.part.y.queries_of(p.y, n_y) : tile.part.y.keys_of(p.y, n_y);
      const Range x = kOfKeys ? tile.part.x.queries_of(p.x, n_x) : tile.part.x.keys_of(p.x, n_x);
      // Of whole lines the sides may differ in length.
      const Grid far = kOfKeys ? tile.region.queries() : tile.region.keys();
      rows[r].first_y = int(y.first), rows[r].count_y = tile.part.y.near() ? int(y.size()) : int(far.h);
      rows[r].first_x = int(x.first), rows[r].count_x = tile.part.x.near() ? int(x.size()) : int(far.w);
      first = rows[r].first_y < first ? rows[r].first_y : first;
      end = rows[r].first_y + rows[r].count_y > end ? rows[r].first_y + rows[r].count_y : end;
    }
    for (int mask = 4; mask < 32; mask *= 2) {
      const int other = shuffle_xor(first, mask), other_end = shuffle_xor(end, mask);
      first = other < first ? other : first, end = other_end > end ? other_end : end;
    }
    reach_y = first, reach_h = end - first;
  }

  // Start to load the slots from `start` on.
  VISATTN_DEVICE void load_stage(int stage, int start) const {
    const int slot = thread() / kPerRow, part = thread() % kPerRow;
    const int i = start + slot, width = int(tile.far.w);
    const bool there = i < tile.count;
    const Place p{there ? int(tile.far.y) + i / width : kNowhere, there ? int(tile.far.x) + i % width : 0};
    const bool present = there && on_map(p);
    const Map& first = kOfKeys ? call.q : call.k;
    const Map& second = kOfKeys ? call.grad_out : call.v;
    const int64_t first_head = kOfKeys ? head : kv_head;
    const T* base = static_cast<const T*>(first.data) + first.at(tile.batch, first_head);
    load_row<T, C::kD, kPerRow>(far1(stage) + slot * C::kLd,
                                present ? base + offset_of<kOfKeys>(tile.region, first, p) : base, first.channel,
                                present, plan.vector[2], part);
    base = static_cast<const T*>(second.data) + second.at(tile.batch, first_head);
    load_row<T, C::kDv, kPerRow>(far2(stage) + slot * C::kLdv,
                                 present ? base + offset_of<kOfKeys>(tile.region, second, p) : base, second.channel,
                                 present, plan.vector[3], part);
    if (part == 0) {
      far_places(stage)[slot] = p;
      float* const numbers = far_numbers(stage);
      if constexpr (kOfKeys) {
        numbers[slot] = present ? lse_of(p) : 0.0f;
        numbers[kSlots + slot] = present ? delta_of(p) : 0.0f;
      } else if constexpr (C::kBias) {
        // A key outside the map has no bias: there is nothing to remove.
        if (call.key_bias.data) numbers[slot] = present ? key_bias(p) : 0.0f;
      }
    }
    copy_commit();
  }

  // lse of a query, in the units of scores.
  VISATTN_DEVICE float lse_of(Place p) const {
    const Map& m = call.lse;
    return static_cast<const float*>(m.data)[m.at(tile.batch, head) + offset_of<true>(tile.region, m, p)] * C::kUnit;
  }
  VISATTN_DEVICE float delta_of(Place p) const {
    const Map& m = call.delta;
    return static_cast<const float*>(m.data)[m.at(tile.batch, head) + offset_of<true>(tile.region, m, p)];
  }

  // Which groups of 16 slots of a stage the warp may have pairs in.
  VISATTN_DEVICE uint32_t live(int stage, int start) const {
    uint32_t groups = 0;
#pragma unroll
    for (int j = 0; j < kSlots / 16; ++j) {
      const int left = tile.count - start - 16 * j;
      if (left <= 0) continue;
      if constexpr (C::kMasked) {
        const Place* const p = far_places(stage) + 16 * j;
        const int last = left < 16 ? left - 1 : 15;
        if (p[last].y < reach_y || p[0].y >= reach_y + reach_h) continue;
      }
      groups |= 1u << j;
    }
    return groups;
  }

  VISATTN_DEVICE bool is_member(const Row& r, Place far, int slot) const {
    if constexpr (!C::kMasked) return slot < tile.count;
    return uint32_t(far.y - r.first_y) < uint32_t(r.count_y) && uint32_t(far.x - r.first_x) < uint32_t(r.count_x) &&
           !(tile.part.others && far.y == r.place.y && far.x == r.place.x);
  }

  // Into scores: the factor, what the terms add, and -inf where there is no pair. Keys take their own bias from
  // `row_bias`.
  VISATTN_DEVICE void add_terms(float (&scores)[kChunks][4], int stage, int start, uint32_t groups,
                                const float (&row_bias)[2]) const {
    const float factor = float(call.problem.scale) * C::kUnit;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (!(groups >> (j / 2) & 1)) continue;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * j + 2 * (lane() & 3) + c;
        Place far{};
        if constexpr (C::kMasked) far = far_places(stage)[column];
        float column_bias = 0;
        if constexpr (C::kBias && !kOfKeys)
          if (call.key_bias.data) column_bias = far_numbers(stage)[column];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& x = scores[j][2 * r + c];
          const bool member = is_member(rows[r], far, start + column);
          x *= factor;
          if constexpr (C::kBias) {
            const float bias = kOfKeys ? row_bias[r] : column_bias;
            if (member && bias != -kInfinity) {
              x += bias * C::kUnit;
              if (call.bias.data) x += shared<float>(plan.bias)[bias_entry(rows[r].place, far)];
              if constexpr (C::kVectors) {
                x += look_up(kQueryTerm, r, column, far) + look_up(kKeyTerm, r, column, far);
              }
            } else {
              x = -kInfinity;
            }
          } else {
            x = member ? x : -kInfinity;
          }
        }
      }
    }
  }

  VISATTN_DEVICE int bias_entry(Place near, Place far) const {
    const int y = kOfKeys ? near.y - far.y : far.y - near.y, x = kOfKeys ? near.x - far.x : far.x - near.x;
    return (y + plan.reach[0] - 1) * plan.entries_w + x + plan.reach[1] - 1;
  }

  // Whether near rows, not slots, are multiplied with a term's tables.
  static VISATTN_DEVICE constexpr bool near_looks_up(VectorTerm term) { return kOfKeys == (term == kKeyTerm); }

  // What a vector term adds to a pair: its row's product with the entries of both offsets.
  VISATTN_DEVICE float look_up(VectorTerm term, int r, int column, Place far) const {
    const VectorPlan& v = plan.vectors[term];
    if (v.lookup < 0) return 0.0f;
    const bool near = near_looks_up(term);
    const float* const numbers = shared<float>(v.lookup) + (near ? row(r) : column) * ((v.lookup_h + v.lookup_w) | 1);
    float x = 0;
    if (v.lookup_h) x += numbers[near ? far.y - int(tile.far.y) : rows[r].place.y - int(tile.own.y)];
    if (v.lookup_w) x += numbers[v.lookup_h + (near ? far.x - int(tile.far.x) : rows[r].place.x - int(tile.own.x))];
    return x;
  }

  VISATTN_DEVICE Span span_of(int axis) const {
    const Box& keys = kOfKeys ? tile.own : tile.far;
    const Box& queries = kOfKeys ? tile.far : tile.own;
    const int64_t k = plan.reach[axis];
    const int64_t first = axis ? keys.x - queries.x - queries.w + 1 : keys.y - queries.y - queries.h + 1;
    const int64_t last = axis ? keys.x + keys.w - 1 - queries.x : keys.y + keys.h - 1 - queries.y;
    const int64_t from = greatest(first, 1 - k);
    return {int(from), int(least(last, k - 1) - from + 1)};
  }

  // Entries of a table from `first` on (of `count` that the tile meets) to rows of shared memory, by the whole block.
  template <int kWidth>
  VISATTN_DEVICE void load_entries(T* to, const Table& table, int axis, Span span, int first) const {
    const int slot = thread() / kPerRow, e = first + slot;
    const bool present = e < span.count;
    const T* const base = static_cast<const T*>(table.data) + head * table.head;
    const int64_t bytes = int64_t(sizeof(T));
    const bool vector = table.column == 1 && table.entry * bytes % 16 == 0 && table.head * bytes % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(table.data) % 16 == 0;
    const int64_t entry = table_entry(span.first + e, plan.reach[axis]);
    load_row<T, kWidth, kPerRow>(to + slot * (kWidth + C::kVector), present ? base + entry * table.entry : base,
                                 table.column, present, vector, thread() % kPerRow);
  }

  // The other side's coordinate, from the start of its box, of an offset from a row; of queries' rows or keys' rows.
  VISATTN_DEVICE int coordinate(bool of_queries, int own, int offset, int axis, bool near) const {
    const Box& other = near ? tile.far : tile.own;
    return (of_queries ? own + offset : own - offset) - int(axis ? other.x : other.y);
  }

  // Products of 16 rows with entries [first, first + kColumns) of a span, in `table`, to the numbers that pairs look
  // up.
  template <int kWidth, int kColumns>
  VISATTN_DEVICE void write_lookups(VectorTerm term, int axis, const T* rows16, const Place* places16, int row0,
                                    const T* table, Span span, int first) const {
    const VectorPlan& v = plan.vectors[term];
    const bool near = near_looks_up(term), of_queries = term != kKeyTerm;
    const int extent = axis ? v.lookup_w : v.lookup_h, ld = (v.lookup_h + v.lookup_w) | 1;
    const float factor = term == kValueTerm ? 1.0f : float(call.vector_scale[term]) * C::kUnit;
    float x[kColumns / 8][4] = {};
    multiply_rows<C, kWidth, kColumns>(x, rows16, table, ~0u);
    for (int r = 0; r < 2; ++r) {
      const int at = (lane() >> 2) + 8 * r;
      const Place p = places16[at];
      if (p.y == kNowhere) continue;
      float* const to = shared<float>(v.lookup) + (row0 + at) * ld + (axis ? v.lookup_h : 0);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
        for (int c = 0; c < 2; ++c) {
          const int e = first + 8 * j + 2 * (lane() & 3) + c;
          const int where = coordinate(of_queries, axis ? p.x : p.y, span.first + e, axis, near);
          if (e < span.count && where >= 0 && where < extent) to[where] = x[j][2 * r + c] * factor;
        }
    }
    sync_warp();  // lanes without a position have gone on to the next collective
  }

  // Lookups of the near rows, for the whole tile. Uses the stages.
  template <int kWidth>
  VISATTN_DEVICE void look_up_near(VectorTerm term, const T* near) const {
    if (plan.vectors[term].lookup < 0) return;
    T* const to = kWidth == C::kD ? far1(0) : far2(0);
#pragma unroll 1
    for (int axis = 0; axis < 2; ++axis) {
      const Table& table = call.vector[term][axis];
      if (!table.data) continue;
      const Span span = span_of(axis);
      for (int first = 0; first < span.count; first += kSlots) {
        load_entries<kWidth>(to, table, axis, span, first);
        copy_commit(), copy_wait<0>(), sync_block();
        write_lookups<kWidth, kSlots>(term, axis, near + 16 * warp() * (kWidth + C::kVector), places() + 16 * warp(),
                                      16 * warp(), to, span, first);
        sync_block();
      }
    }
  }

  // The entries that slots will be multiplied with, kept for the whole tile: those of the height, then of the width.
  template <int kWidth>
  VISATTN_DEVICE void keep_table(VectorTerm term) const {
    if (plan.vectors[term].table < 0) return;
    T* to = shared<T>(plan.vectors[term].table);
#pragma unroll 1
    for (int axis = 0; axis < 2; ++axis) {
      if (!call.vector[term][axis].data) continue;
      const Span span = span_of(axis);
      for (int first = 0; first < span.count; first += kSlots, to += kSlots * (kWidth + C::kVector))
        load_entries<kWidth>(to, call.vector[term][axis], axis, span, first);
    }
    copy_commit(), copy_wait<0>();
  }

  // Lookups of the slots of a stage.
  template <int kWidth>
  VISATTN_DEVICE void look_up_far(VectorTerm term, int stage, const T* rows) const {
    if (plan.vectors[term].table < 0) return;
    const T* table = shared<T>(plan.vectors[term].table);
#pragma unroll 1
    for (int axis = 0; axis < 2; ++axis) {
      if (!call.vector[term][axis].data) continue;
      const Span span = span_of(axis);
      for (int group = warp(); group < kSlots / 16; group += kWarps)
        for (int first = 0; first < span.count; first += 16)
          write_lookups<kWidth, 16>(term, axis, rows + 16 * group * (kWidth + C::kVector),
                                    far_places(stage) + 16 * group, 16 * group, table + first * (kWidth + C::kVector),
                                    span, first);
      table += (span.count + kSlots - 1) / kSlots * kSlots * (kWidth + C::kVector);
    }
  }

  // The warp's 16 rows of weights to shared memory, absent ones as they are; `weights` of dead groups count as absent.
  VISATTN_DEVICE void stage_weights(const float (&weights)[kChunks][4], uint32_t groups) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
      for (int i = 0; i < 4; ++i)
        staged()[row(i >> 1) * kStagedLd + 8 * j + 2 * (lane() & 3) + (i & 1)] =
            groups >> (j / 2) & 1 ? weights[j][i] : kAbsent;
  }

  VISATTN_DEVICE float* sums_of(VectorTerm term, int r) const {
    const VectorPlan& v = plan.vectors[term];
    return shared<float>(v.sums) + r * ((v.sums_h + v.sums_w) | 1);
  }

  VISATTN_DEVICE void clear_sums(VectorTerm term) const {
    const VectorPlan& v = plan.vectors[term];
    if (v.sums < 0) return;
    for (int r = 16 * warp(); r < 16 * warp() + 16; ++r)
      for (int i = lane(); i < v.sums_h + v.sums_w; i += 32) sums_of(term, r)[i] = kAbsent;
    sync_warp();
  }

  // Add the staged weights of the warp's rows to the sums of their rows and columns of far positions, which are
  // multiplied before by `rescale` (of the lane's two rows).
  VISATTN_DEVICE void add_staged(VectorTerm term, int start, const float (&rescale)[2]) const {
    const VectorPlan& v = plan.vectors[term];
    if (v.sums < 0) return;
    const int width = int(tile.far.w), end = start + kSlots < tile.count ? start + kSlots : tile.count;
    const int first_y = start / width, last_y = (end - 1) / width;
    for (int i = 0; i < 16; ++i) {
      const float low = shuffle(rescale[0], (i & 7) * 4), high = shuffle(rescale[1], (i & 7) * 4);
      const float factor = i < 8 ? low : high;
      float* const sums = sums_of(term, 16 * warp() + i);
      const float* const from = staged() + (16 * warp() + i) * kStagedLd;
      for (int y = lane(); y < v.sums_h; y += 32) {
        float sum = sums[y] * factor;
        if (y >= first_y && y <= last_y) {
          const int begin = y * width > start ? y * width : start, stop = (y + 1) * width < end ? (y + 1) * width : end;
          for (int s = begin; s < stop; ++s) sum += from[s - start];
        }
        sums[y] = sum;
      }
      for (int x = lane(); x < (width < v.sums_w ? width : v.sums_w); x += 32) {
        float sum = sums[v.sums_h + x] * factor;
        for (int y = first_y; y <= last_y; ++y) {
          const int s = y * width + x;
          if (s >= start && s < end) sum += from[s - start];
        }
        sums[v.sums_h + x] = sum;
      }
    }
    sync_warp();
  }

  // What fell on an offset from a row of the block; absent if nothing did.
  VISATTN_DEVICE float sum_at(VectorTerm term, int axis, int r, int offset) const {
    const VectorPlan& v = plan.vectors[term];
    const Place p = places()[r];
    const int extent = axis ? v.sums_w : v.sums_h, box = int(axis ? tile.far.w : tile.far.h);
    const int where = coordinate(term != kKeyTerm, axis ? p.x : p.y, offset, axis, true);
    return p.y != kNowhere && where >= 0 && where < extent && where < box
               ? sums_of(term, r)[(axis ? v.sums_h : 0) + where]
               : kAbsent;
  }

  // sums[16][kWidth] += factor * (the near rows' sums by offset) · entries. By the whole block; uses the stages.
  template <int kWidth>
  VISATTN_DEVICE void multiply_entries(VectorTerm term, float (&sums)[kWidth / 8][4], float factor) const {
    if (plan.vectors[term].sums < 0) return;
    T* const buffer = kWidth == C::kD ? far1(0) : far2(0);
#pragma unroll 1
    for (int axis = 0; axis < 2; ++axis) {
      const Table& table = call.vector[term][axis];
      if (!table.data) continue;
      const Span span = span_of(axis);
      for (int first = 0; first < span.count; first += kSlots) {
        load_entries<kWidth>(buffer, table, axis, span, first);
        copy_commit(), copy_wait<0>(), sync_block();
        float part[kWidth / 8][4] = {};
        for (int k = 0; k < kSlots && first + k < span.count; k += C::kStep) {
          float x[2][4];
          for (int i = 0; i < 8; ++i) {
            const int e = first + k + 2 * (lane() & 3) + (i & 1) + 8 * (i >> 2);
            x[i >> 2][i & 3] = e < span.count && (C::kStep == 16 || i < 4)
                                   ? sum_at(term, axis, row(i >> 1 & 1), span.first + e)
                                   : 0.0f;
          }
          uint32_t a[4];
          operand<C>(a, x[0], x[1]);
          multiply_step<C, kWidth>(part, a, buffer + k * (kWidth + C::kVector));
        }
        if (warp_any(any_not_finite(part))) {
          for (auto& four : part)
            for (float& x : four) x = 0;
#pragma unroll 1
          for (int k = 0; k < kSlots && first + k < span.count; ++k) {
            const float x[2] = {sum_at(term, axis, row(0), span.first + first + k),
                                sum_at(term, axis, row(1), span.first + first + k)};
            add_carefully<kWidth>(part, x, buffer + k * (kWidth + C::kVector));
          }
        }
        for (int n = 0; n < kWidth / 8; ++n)
          for (int i = 0; i < 4; ++i) sums[n][i] += part[n][i] * factor;
        sync_block();
      }
    }
  }

  // The block's share of a table's gradient: partials[offset] += factor * sum over near rows of (what fell on the
  // offset from a row) * the row. By the whole block, after a barrier.
  template <int kWidth>
  VISATTN_DEVICE void add_table_gradient(VectorTerm term, float* partials, const T* near, float factor) const {
    constexpr int kLd = kWidth + C::kVector;
#pragma unroll 1
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t to = call.partial_offset[table_slot(term, axis)];
      if (to < 0) continue;
      const Span span = span_of(axis);
      for (int first = 16 * warp(); first < span.count; first += kNear) {
        float part[kWidth / 8][4] = {};
        for (int k = 0; k < kNear; k += C::kStep) {
          float x[2][4];
          for (int i = 0; i < 8; ++i) {
            const int e = first + (lane() >> 2) + 8 * (i >> 1 & 1), r = k + 2 * (lane() & 3) + (i & 1) + 8 * (i >> 2);
            x[i >> 2][i & 3] =
                e < span.count && (C::kStep == 16 || i < 4) ? sum_at(term, axis, r, span.first + e) : 0.0f;
          }
          uint32_t a[4];
          operand<C>(a, x[0], x[1]);
          multiply_step<C, kWidth>(part, a, near + k * kLd);
        }
        const int e = first + (lane() >> 2);
        if (warp_any(any_not_finite(part))) {
          for (auto& four : part)
            for (float& x : four) x = 0;
#pragma unroll 1
          for (int r = 0; r < kNear; ++r) {
            const float x[2] = {e < span.count ? sum_at(term, axis, r, span.first + e) : kAbsent,
                                e + 8 < span.count ? sum_at(term, axis, r, span.first + e + 8) : kAbsent};
            add_carefully<kWidth>(part, x, near + r * kLd);
          }
        }
        for (int i = 0; i < 2; ++i) {
          if (e + 8 * i >= span.count) continue;
          float* const entry = partials + to + table_entry(span.first + e + 8 * i, plan.reach[axis]) * kWidth;
#pragma unroll
          for (int n = 0; n < kWidth / 8; ++n)
            for (int c = 0; c < 2; ++c) entry[8 * n + 2 * (lane() & 3) + c] += part[n][2 * i + c] * factor;
        }
      }
    }
  }

  // sums[16][kWidth] += x (of the lane's two rows) * a row, where x is not absent.
  template <int kWidth>
  static VISATTN_DEVICE void add_carefully(float (&sums)[kWidth / 8][4], const float (&x)[2], const T* from) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
      for (int i = 0; i < 4; ++i)
        if (!absent(x[i >> 1])) sums[n][i] += x[i >> 1] * to_float(from[8 * n + 2 * (lane() & 3) + (i & 1)]);
  }

  // The bias table's entries, in the units of scores.
  VISATTN_DEVICE void load_bias() const {
    if (plan.bias < 0) return;
    const int n = plan.entries_w * plan.entries_h;
    const T* const from = static_cast<const T*>(call.bias.data) + head * call.bias.head;
    for (int e = thread(); e < n; e += kThreads)
      shared<float>(plan.bias)[e] =
          to_float(from[e / plan.entries_w * call.bias.entry + e % plan.entries_w * call.bias.column]) * C::kUnit;
  }

  // Add the block's staged weights to the sums of the bias table's entries, each by one thread. Between barriers.
  VISATTN_DEVICE void add_staged_bias(int start) const {
    const int entries = plan.entries_w, n = entries * plan.entries_h;
    const int width = int(tile.far.w), end = tile.count - start < kSlots ? tile.count - start : kSlots;
    for (int e = thread(); e < n; e += kThreads) {
      const int dy = e / entries - plan.reach[0] + 1 - int(tile.far.y);
      const int dx = e % entries - plan.reach[1] + 1 - int(tile.far.x);
      float sum = 0;
      for (int r = 0; r < kNear; ++r) {
        const Place p = places()[r];
        const int y = p.y + dy, x = p.x + dx, s = y * width + x - start;
        if (p.y != kNowhere && x >= 0 && x < width && y >= 0 && y < int(tile.far.h) && s >= 0 && s < end)
          sum += staged()[r * kStagedLd + s];
      }
      shared<float>(plan.bias_sums)[e] += sum;
    }
  }
};

}  // namespace visattn::cuda
