// Scores of a tile with a block of what it walks, natural: products, terms and mask, for every pass.
#pragma once

#include "relative.h"

namespace visattn::cpu::VISATTN_ISA {

// A walk of one side's tiles: where it stands, and the scores there.
template <class T>
struct Walk {
  using M = typename Arithmetic<T>::Type;
  using Acc = typename M::Acc;
  using Elem = typename M::Elem;
  static constexpr int L = kTile<M>, W = kLanes<Acc>, kMaxVectors = Tile<M>::kMaxVectors;
  static constexpr Acc kMinusInf = -Acc(__builtin_inf());

  const Call& call;
  const Problem& p;
  Plan<M> plan;
  bool queries;  // whether queries are resident
  bool guarded;  // some pairs may be masked: what they hold must not leak
  int64_t b, head, kv_head, loaded;
  Tile<M> tile;
  Block<Acc> block;
  int64_t from[kMaxVectors], to[kMaxVectors];  // rows of the block that each vector walks
  int64_t step;                                // positions of a block: all blocks of a box are of one size

  Elem *panel, *staged;
  Staged<M> rows;  // the walked side of the scores
  Acc* scores;     // [kBlock][L], of one panel
  int64_t *offset, *walked;
  Acc *lane_rows, *walk_rows, *key_bias;
  LaneTerm<M> lane[2];
  WalkTerm<M> walk[2];
  BiasTerm<M> bias;

  // `sums`, `walk_sums`: whether the pass sums gradients of the terms of resident vectors and of the bias, and of the
  // terms of walked vectors.
  Walk(Arena& arena, const Call& call, bool queries, int threads, bool shares, bool sums, bool walk_sums)
      : call(call),
        p(call.problem),
        plan(call, queries, threads, shares, walk_sums && call.has_vector(kQueryTerm)),
        queries(queries),
        guarded(plan.near || plan.part.others || call.key_bias.data),
        b(0),
        head(-1),
        kv_head(-1),
        loaded(-1),
        panel(arena.take<Elem>(kPanels * panel_elements<M>(p.head_dim))),
        staged(arena.take<Elem>(staged_elements<M>(p.head_dim))),
        scores(arena.take<Acc>(kBlock * L)),
        offset(arena.take<int64_t>(kPanels * L)),
        walked(arena.take<int64_t>(kBlock)),
        lane_rows(arena.take<Acc>(call.has_vector(lane_side()) ? kPanels * L * padded<Acc>(p.head_dim) : 0)),
        walk_rows(arena.take<Acc>(call.has_vector(walk_side()) ? kBlock * padded<Acc>(p.head_dim) : 0)),
        key_bias(arena.take<Acc>(call.key_bias.data ? max(kPanels * L, kBlock) : 0)),
        lane{lane_term(arena, lane_side(), 0, true, sums), lane_term(arena, lane_side(), 1, true, sums)},
        walk{walk_term(arena, walk_side(), 0, walk_sums), walk_term(arena, walk_side(), 1, walk_sums)},
        bias(arena, call.bias.data, sums && call.wants_table(0), queries, p.reach(0), p.reach(1), bias_rows()) {
    for (int axis = 0; axis < 2; ++axis) {
      lane[axis].factor = Acc(call.vector_scale[lane_side()]);
      walk[axis].factor = Acc(call.vector_scale[walk_side()]);
    }
  }

  VectorTerm lane_side() const { return queries ? kQueryTerm : kKeyTerm; }
  VectorTerm walk_side() const { return queries ? kKeyTerm : kQueryTerm; }

  LaneTerm<M> lane_term(Arena& arena, VectorTerm term, int axis, bool reads, bool sums) const {
    return {arena,
            call.vector[term][axis].data != nullptr,
            reads,
            sums,
            axis,
            table_slot(term, axis),
            p.reach(axis),
            p.channels(term),
            plan.walked_extent(axis),
            plan.resident_extent(axis)};
  }

  WalkTerm<M> walk_term(Arena& arena, VectorTerm term, int axis, bool sums) const {
    return {arena,
            call.vector[term][axis].data != nullptr,
            sums,
            axis,
            table_slot(term, axis),
            p.reach(axis),
            p.channels(term),
            plan.walked_extent(axis),
            plan.resident_extent(axis)};
  }

  int64_t bias_rows() const {
    int64_t rows = 1;
    for (int axis = 0; axis < 2; ++axis) rows *= plan.walked_extent(axis);
    return rows;
  }

  const Map& resident_map() const { return queries ? call.q : call.k; }
  const Map& walked_map() const { return queries ? call.k : call.q; }
  int64_t resident_head() const { return queries ? head : kv_head; }
  int64_t walked_head() const { return queries ? kv_head : head; }

  // Call f(pair) for the tiles of an item, one after the other.
  template <class F>
  VISATTN_INLINE void tiles(int64_t item, F f) {
    const int64_t first = item / plan.heads * plan.chunk;
    for (int64_t i = first; i < min(first + plan.chunk, plan.pairs); ++i) {
      const auto pair = plan.pair(i);
      b = pair.b;
      if (plan.fill(pair.region, pair.tile, tile)) f(pair);
    }
  }

  // Take up a query head, whose tables are read once.
  void set_head(int64_t h) {
    head = h, kv_head = h / p.group();
    if (loaded == h) return;
    loaded = h;
    for (int axis = 0; axis < 2; ++axis) {
      if (lane[axis].on) lane[axis].table.template load<T>(call.vector[lane_side()][axis], h, !queries);
      if (walk[axis].on) walk[axis].table.template load<T>(call.vector[walk_side()][axis], h, queries);
    }
    if (bias.on) bias.template load_table<T>(call.bias, h);
  }

  // Pack a panel of the resident side for every panel of the tile.
  void pack(const Map& map, int64_t h, int64_t channels, Elem* to) {
    tile.offsets(map, offset);
    for (int v = 0; v < tile.vectors; ++v) {
      const int t = tile.panel_of(v), lane = tile.lane_of(v);
      pack_vector<M>(at<T>(map, b, h), offset + lane, channels, map.channel,
                     to + t * panel_elements<M>(channels) + lane % L);
    }
  }

  // One number per lane, wherever what is kept per query lies; 0 in lanes that are left over.
  void load_lanes(const Map& map, Acc* to) {
    tile.result_offsets(map, offset);
    const Acc* from = at<Acc>(map, b, head);
    for (int v = 0; v < tile.vectors; ++v)
      for (int l = tile.lane_of(v), end = l + W; l < end; ++l) to[l] = offset[l] == kNowhere ? Acc(0) : from[offset[l]];
  }

  // The resident vectors as rows; lanes of vectors that the tile has not are left alone.
  void load_lane_rows(const Map& map, int64_t h, int64_t channels, Acc* to) {
    tile.offsets(map, offset);
    for (int v = 0; v < tile.vectors; ++v) {
      const int lane = tile.lane_of(v);
      load_rows(at<T>(map, b, h), offset + lane, W, channels, map.channel, to + lane * padded<Acc>(channels));
    }
  }

  // Take up the tile in hand. `start_head` follows, for the head that is set.
  void start_tile() { pack(resident_map(), resident_head(), p.head_dim, panel); }

  void start_head() {
    if (lane[0].on || lane[1].on) load_lane_rows(resident_map(), resident_head(), p.head_dim, lane_rows);
    for (auto& term : lane)
      if (term.on) term.read(tile, lane_rows);
    if (bias.on) bias.read(tile, plan.part.y.near(), plan.part.x.near());
    if (call.key_bias.data && !queries) {
      tile.offsets(call.key_bias, offset);
      for (int v = 0; v < tile.vectors; ++v)
        for (int l = tile.lane_of(v), end = l + W; l < end; ++l)
          key_bias[l] = offset[l] == kNowhere ? Acc(0) : bias_at(offset[l]);
    }
  }

  Acc bias_at(int64_t at_offset) const { return Acc(widen(at<T>(call.key_bias, b, head)[at_offset])); }

  Rows<T> walked_rows(const Map& map, int64_t h, int64_t channels) {
    block.offsets(tile.walked_y, tile.walked_x, map, walked);
    return {at<T>(map, b, h), walked, block.n, channels, map.channel};
  }

  // Call f() for the blocks of the tile's box.
  template <class F>
  VISATTN_INLINE void blocks(F f) {
    const int64_t size = tile.box.size(), n = ceil_div(size, kBlock);
    step = n > 0 ? (ceil_div(size, n) + 1) / 2 * 2 : kBlock;  // pairs of positions stay in one block
    for (int64_t first = 0; first < size; first += step) {
      next_block(first);
      f();
    }
  }

  // Stage the block that starts at `first`.
  void next_block(int64_t first) {
    block.set(tile.box, first, step);
    for (int v = 0; v < tile.vectors; ++v) {
      from[v] = min(max(0, tile.from[v] - first), block.n);
      to[v] = max(from[v], min(tile.to[v] - first, block.n));
      if (M::kPair == 2 && from[v] < to[v]) from[v] &= ~int64_t(1), to[v] = min(to[v] + to[v] % 2, block.n);
    }
    const Rows<T> source = walked_rows(walked_map(), walked_head(), p.head_dim);
    rows = stage<M>(source, Use::kScores, staged);
    if (walk[0].on || walk[1].on) {
      load_rows(source.data, source.offset, source.n, source.channels, source.stride, walk_rows);
      for (auto& term : walk)
        if (term.on) term.read(tile, block, walk_rows);
    }
    if (bias.on) bias.read_block(tile, block);
    if (call.key_bias.data && queries) {
      block.offsets(tile.walked_y, tile.walked_x, call.key_bias, walked);
      for (int64_t r = 0; r < block.n; ++r) key_bias[r] = walked[r] == kNowhere ? Acc(0) : bias_at(walked[r]);
    }
  }

  // Call f(from, to, first vector, end vector) for stretches of the block's rows and the vectors of panel t that walk
  // all of them; every such pair of a row and a vector is in one stretch.
  template <class F>
  VISATTN_INLINE void stretches(int t, F f) const {
    const int first = tile.panel_first[t], end = tile.panel_first[t + 1];
    for (int64_t row = 0; row < block.n;) {
      int64_t next = block.n;
      for (int v = first; v < end; ++v) {
        if (from[v] > row) next = min(next, from[v]);
        if (to[v] > row) next = min(next, to[v]);
      }
      for (int v = first; v < end;) {
        if (row < from[v] || row >= to[v]) {
          ++v;
          continue;
        }
        int last = v + 1;
        while (last < end && from[last] <= row && row < to[last]) ++last;
        f(row, next, v - first, last - first);
        v = last;
      }
      row = next;
    }
  }

  // out[r][lane] = factor * walked_r · resident_lane for panel t.
  void dot(int t, const Staged<M>& walked_side, const Elem* resident, Acc* out, Acc factor) const {
    stretches(t, [&](int64_t row, int64_t end, int v0, int v1) {
      product<M, false>(v1 - v0, walked_side.data + row * walked_side.scores.row, walked_side.scores, end - row,
                        walked_side.scores_k, resident + v0 * W, out + row * L + v0 * W, factor);
    });
  }

  // Mark a block that was staged for sums if it holds a NaN or an infinity that some lanes must not see.
  Staged<M> guard(Staged<M> side, int64_t channels) const {
    side.infinite = guarded && any_not_finite<M>(side, channels);
    return side;
  }

  // sum[channel][lane] += sum over rows of weights[r][lane] * walked_r. `source` is what `side` was staged from.
  void add(const BlockSums<M>& sum, int t, const Staged<M>& side, const Rows<T>& source, const Acc* weights,
           Elem* packed) const {
    if (side.infinite) return add_weighted(sum, t, source, weights);
    const Elem* right = pack_weights(weights, packed, t);
    stretches(t, [&](int64_t row, int64_t end, int v0, int v1) {
      product<M, true>(v1 - v0, side.data + row / M::kPair * side.sums.k, side.sums, source.channels,
                       ceil_div(end - row, M::kPair), right + row / M::kPair * L + v0 * W, sum.part(t) + v0 * W,
                       Acc(1));
    });
  }

  // The same where some walked numbers are NaN or infinite: a pair of weight zero adds nothing, whatever they are.
  void add_weighted(const BlockSums<M>& sum, int t, const Rows<T>& source, const Acc* weights) const {
    stretches(t, [&](int64_t row, int64_t end, int v0, int v1) {
      for (int64_t r = row; r < end; ++r) {
        if (source.offset[r] == kNowhere) continue;
        for (int v = v0; v < v1; ++v) {
          const Vec<Acc> weight = load(weights + r * L + v * W);
          for (int64_t c = 0; c < source.channels; ++c) {
            Acc* to = sum.part(t) + c * L + v * W;
            const Vec<Acc> x = broadcast(Acc(widen(source.data[source.offset[r] + c * source.stride])));
            store(to, load(to) + (weight == 0 ? Vec<Acc>{} : weight * x));
          }
        }
      }
    });
  }

  // A panel's weights as the right factor of `add`.
  const Elem* pack_weights(const Acc* weights, [[maybe_unused]] Elem* packed, [[maybe_unused]] int t) const {
    if constexpr (M::kPair == 1) {
      return weights;
    } else {
      for (int v = tile.panel_first[t]; v < tile.panel_first[t + 1]; ++v)
        pack_weight_pairs(weights + (v - tile.panel_first[t]) * W, from[v], to[v],
                          packed + (v - tile.panel_first[t]) * W);
      return packed;
    }
  }

  // For the rows that each vector of panel t walks: f(lane in the panel, lane in the tile, vector, from, to).
  template <class F>
  VISATTN_INLINE void vectors(int t, F f) const {
    for (int v = tile.panel_first[t]; v < tile.panel_first[t + 1]; ++v)
      f((v - tile.panel_first[t]) * W, tile.lane_of(v), v, from[v], to[v]);
  }

  // For each vector of panel t: f(lane in the panel, lane in the tile).
  template <class F>
  VISATTN_INLINE void vectors_of(int t, F f) const {
    vectors(t, [&](int at_lane, int lane, int, int64_t, int64_t) { f(at_lane, lane); });
  }

  static VISATTN_INLINE void add_to(Acc* p, Vec<Acc> x) { store(p, load(p) + x); }

  const Index<Acc>* walked_index(int axis) const { return axis ? block.x : block.y; }

  // target[r][lane] += what a lane term has for them.
  void add_lane(const LaneTerm<M>& term, int t, Acc* target) const {
    const Index<Acc>* index = walked_index(term.axis);
    const int64_t first = term.first(tile);
    vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
      for (int64_t r = row; r < end; ++r)
        add_to(target + r * L + at_lane, load(term.values + (index[r] - first) * kPanels * L + lane));
    });
  }

  // A lane term's sums += source[r][lane].
  void sum_lane(LaneTerm<M>& term, int t, const Acc* source) const {
    const Index<Acc>* index = walked_index(term.axis);
    const int64_t first = term.first(tile);
    vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
      for (int64_t r = row; r < end; ++r)
        add_to(term.sums + (index[r] - first) * kPanels * L + lane, load(source + r * L + at_lane));
    });
  }

  // A walk term's sums += source[r][lane].
  void sum_walk(WalkTerm<M>& term, int t, const Acc* source) const {
    vectors(t, [&](int at_lane, int lane, int v, int64_t row, int64_t end) {
      term.sum(tile, block, v, lane, row, end, source + at_lane);
    });
  }

  void sum_bias(int t, const Acc* source) {
    vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
      for (int64_t r = row; r < end; ++r)
        add_to(bias.sums + bias.row(tile, block, r) + lane, load(source + r * L + at_lane));
    });
  }

  void add_lanes(int t) {
    for (const auto& term : lane)
      if (term.on) add_lane(term, t, scores);
  }

  void add_walks(int t) {
    for (const auto& term : walk)
      if (term.on)
        vectors(t, [&](int at_lane, int lane, int v, int64_t row, int64_t end) {
          term.add(tile, block, v, lane, row, end, scores + at_lane);
        });
  }

  // scores = the logits of panel t, -inf for pairs that are not.
  void score(int t) {
    dot(t, rows, panel + t * panel_elements<M>(p.head_dim), scores, Acc(p.scale));
    // The queries' terms before the keys', so that a score has the same bits whichever side is resident.
    if (queries) add_lanes(t);
    add_walks(t);
    if (!queries) add_lanes(t);
    if (bias.on)
      vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
        for (int64_t r = row; r < end; ++r)
          add_to(scores + r * L + at_lane, load(bias.values + bias.row(tile, block, r) + lane));
      });
    if (call.key_bias.data) add_key_bias(t);
    if (tile.masked) mask(t);
  }

  // -inf removes a key, even one whose score is NaN.
  void add_key_bias(int t) {
    vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
      const Vec<Acc> lanes = queries ? Vec<Acc>{} : load(key_bias + lane);
      for (int64_t r = row; r < end; ++r) {
        Acc* to = scores + r * L + at_lane;
        const Vec<Acc> x = queries ? broadcast(key_bias[r]) : lanes;
        store(to, x == kMinusInf ? x : load(to) + x);
      }
    });
  }

  void mask(int t) {
    using Bits = typename Vector<Acc>::Bits;
    const bool others = plan.part.others;
    vectors(t, [&](int at_lane, int lane, int, int64_t row, int64_t end) {
      const auto first_y = load(tile.first_y + lane), first_x = load(tile.first_x + lane);
      const auto size_y = load(tile.size_y + lane), size_x = load(tile.size_x + lane);
      const auto own_y = load(tile.y + lane), own_x = load(tile.x + lane);
      for (int64_t r = row; r < end; ++r) {
        Acc* to = scores + r * L + at_lane;
        auto inside = ((Bits)(block.y[r] - first_y) < (Bits)size_y) & ((Bits)(block.x[r] - first_x) < (Bits)size_x);
        if (others) inside &= (own_y != block.y[r]) | (own_x != block.x[r]);
        store(to, inside ? load(to) : broadcast(kMinusInf));
      }
    });
  }
};

}  // namespace visattn::cpu::VISATTN_ISA
