// Relative terms: what depends on the offset between a resident and a walked position, one axis at a time.
//
// A vector table adds x_i · rel[offset] to a score (or to the weight's gradient, with x the gradient of out). Those
// products are computed first, O(N K) numbers, and a score only adds two of them. Whose vector it is decides how:
//
//     LaneTerm   x is resident   values[walked index][lane], made once per tile
//     WalkTerm   x is walked     values[walked position][offset], made once per block; a lane finds its own by its
//     index BiasTerm   no vector       a table of numbers by both offsets, spread out once as [walked position][lane]
//
// Sums over a tile's scores in the same shapes are, the other way round, the gradients of those products.
//
// Here an offset is counted as walked minus lane (LaneTerm) or lane minus walked (WalkTerm), so that it grows with what
// is contiguous; a table whose own offsets, key minus query, run the other way is flipped as it is read.
#pragma once

#include "walk.h"

namespace visattn::cpu::VISATTN_ISA {

template <class Acc>
constexpr int64_t padded(int64_t n) {
  return ceil_div(n, kLanes<Acc>) * kLanes<Acc>;
}

// One relative table of the head in hand, in the arithmetic of sums.
template <class Acc>
struct Vectors {
  int64_t reach, channels, entries, ld_transposed, ld_rows;
  Acc *transposed, *rows;  // [channel][entry], zeros past the last; [entry][channel], likewise
  Acc* grad;               // of the table, [entry][channel]
  bool infinite;           // whether the table holds a NaN or an infinity

  // `sums`: whether the table's gradient is summed.
  Vectors(Arena& arena, bool there, bool sums, int64_t reach, int64_t channels)
      : reach(reach),
        channels(channels),
        entries(table_entries(reach)),
        ld_transposed(padded<Acc>(entries) + kTile<Plain<Acc>>),
        ld_rows(padded<Acc>(channels)),
        transposed(arena.take<Acc>(there ? channels * ld_transposed : 0)),
        rows(arena.take<Acc>(there ? entries * ld_rows : 0)),
        grad(arena.take<Acc>(there && sums ? entries * ld_rows : 0)),
        infinite(false) {}

  template <class T>
  void load(const Table& table, int64_t head, bool flip) {
    for (int64_t e = 0; e < entries; ++e) {
      const T* from = (const T*)table.data + head * table.head + (flip ? entries - 1 - e : e) * table.entry;
      for (int64_t c = 0; c < channels; ++c) {
        const Acc x = widen(from[c * table.column]);
        transposed[c * ld_transposed + e] = rows[e * ld_rows + c] = x;
      }
      for (int64_t c = channels; c < ld_rows; ++c) rows[e * ld_rows + c] = 0;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t e = entries; e < ld_transposed; ++e) transposed[c * ld_transposed + e] = 0;
    infinite = any_not_finite<Plain<Acc>>(rows, entries * ld_rows);
  }

  // out[r][c] = factor * a_r · rel[first + c] for c < columns, 0 where the table has no such offset.
  void products(const Acc* a, Strides s, int64_t n, int64_t first, int64_t columns, Acc* out, int64_t ld,
                Acc factor) const {
    const int64_t low = min(max(0, 1 - reach - first), columns), high = max(low, min(columns, reach - first));
    if (high > low)
      wide_product<Plain<Acc>, false>(high - low, a, s, n, channels, transposed + first + low + reach - 1,
                                      ld_transposed, out + low, ld, factor);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < low; ++c) out[r * ld + c] = 0;
      for (int64_t c = high; c < columns; ++c) out[r * ld + c] = 0;
    }
  }

  void start_grad() {
    for (int64_t i = 0; i < entries * ld_rows; ++i) grad[i] = 0;
  }

  // From n rows of sums by offset, the first `first`: out_r += sums_r · rel for `width` channels from `channel` on. A
  // sum of zero adds nothing, even if the vector of its offset is NaN.
  void add_rows(const Acc* sums, int64_t ld, int64_t n, int64_t first, int64_t columns, int64_t channel, int64_t width,
                Acc* out, int64_t ld_out) const {
    const Acc* rel = rows + (first + reach - 1) * ld_rows + channel;
    if (!infinite)
      return wide_product<Plain<Acc>, true>(width, sums, {ld, 1}, n, columns, rel, ld_rows, out, ld_out, 1);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t e = 0; e < columns; ++e) {
        const Acc sum = sums[r * ld + e];
        for (int64_t c = 0; c < width && sum != 0; ++c) out[r * ld_out + c] += sum * rel[e * ld_rows + c];
      }
  }

  // Likewise grad += sums^T x, from rows x_r.
  void add_products(const Acc* sums, int64_t ld, int64_t n, int64_t first, int64_t columns, const Acc* x) {
    Acc* to = grad + (first + reach - 1) * ld_rows;
    if (!any_not_finite<Plain<Acc>>(x, n * ld_rows))
      return wide_product<Plain<Acc>, true>(ld_rows, sums, {1, ld}, columns, n, x, ld_rows, to, ld_rows, 1);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t e = 0; e < columns; ++e) {
        const Acc sum = sums[r * ld + e];
        for (int64_t c = 0; c < ld_rows && sum != 0; ++c) to[e * ld_rows + c] += sum * x[r * ld_rows + c];
      }
  }

  // Add the gradient to a share, in the table's own order.
  void add_grad(Acc* share, bool flip) const {
    for (int64_t e = 0; e < entries; ++e)
      for (int64_t c = 0; c < channels; ++c)
        share[(flip ? entries - 1 - e : e) * channels + c] += grad[e * ld_rows + c];
  }
};

// The vectors of a tile's lanes as rows [lane][channel], zeros in lanes that are left over.
template <class Acc, class T>
VISATTN_INLINE void load_rows(const T* data, const int64_t* offset, int64_t n, int64_t channels, int64_t stride,
                              Acc* to) {
  const int64_t ld = padded<Acc>(channels);
  for (int64_t l = 0; l < n; ++l, to += ld) {
    const bool there = offset[l] != kNowhere;
    for (int64_t c = 0; c < ld; c += kLanes<Acc>) {
      if (!there || stride != 1 || c >= channels)
        store(to + c, Vec<Acc>{});
      else
        store(to + c, load_some<Acc>(data + offset[l] + c, channels - c));
    }
    if (there && stride != 1)
      for (int64_t c = 0; c < channels; ++c) to[c] = widen(data[offset[l] + c * stride]);
  }
}

template <class M>
struct LaneTerm {
  using Acc = typename M::Acc;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;

  bool on;
  int axis;
  int slot;  // where its table's gradient goes
  Acc factor;
  Vectors<Acc> table;
  Acc *values, *sums;  // [walked index][kPanels * L]
  int64_t ld_skewed;
  Acc* skewed;  // [W][offset]: a vector's rows by offset

  // `walked` and `resident`: the longest lines of either side on the axis.
  LaneTerm(Arena& arena, bool on, bool reads, bool sums, int axis, int slot, int64_t reach, int64_t channels,
           int64_t walked, int64_t resident)
      : on(on),
        axis(axis),
        slot(slot),
        factor(1),
        table(arena, on, sums, reach, channels),
        values(arena.take<Acc>(on && reads ? walked * kPanels * L : 0)),
        sums(arena.take<Acc>(on && sums ? walked * kPanels * L : 0)),
        ld_skewed(padded<Acc>(walked + resident + W) + L),
        skewed(arena.take<Acc>(on ? W * ld_skewed : 0)) {}

  const Index<Acc>* index(const Tile<M>& t) const { return axis ? t.x : t.y; }
  int64_t first(const Tile<M>& t) const { return axis ? t.box.x : t.box.y; }
  int64_t extent(const Tile<M>& t) const { return axis ? t.box.w : t.box.h; }

  void last_index(const Tile<M>& t, int lane, int64_t* least, int64_t* most) const {
    *least = *most = index(t)[lane];
    for (int l = lane; l < lane + W; ++l) *least = min(*least, index(t)[l]), *most = max(*most, index(t)[l]);
  }

  // values[w][lane] = factor * x_lane · rel[walked - lane], from the lanes' rows.
  void read(const Tile<M>& t, const Acc* rows) {
    const int64_t n = extent(t), ld = table.ld_rows;
    for (int v = 0; v < t.vectors; ++v) {
      const int lane = t.lane_of(v);
      int64_t least, most;
      last_index(t, lane, &least, &most);
      table.products(rows + lane * ld, {ld, 1}, W, first(t) - most, n + most - least, skewed, ld_skewed, factor);
      for (int64_t w = 0; w < n; w += W) {
        Vec<Acc> square[W];
        for (int l = 0; l < W; ++l) square[l] = load(skewed + l * ld_skewed + w + most - index(t)[lane + l]);
        transpose(square);
        for (int64_t i = 0; i < W && w + i < n; ++i) store(values + (w + i) * kPanels * L + lane, square[i]);
      }
    }
  }

  void start_sums(const Tile<M>& t) {
    for (int64_t w = 0; w < extent(t); ++w)
      for (int64_t l = 0; l < t.panels * L; l += W) store(sums + w * kPanels * L + l, Vec<Acc>{});
  }

  // From the sums by walked index: each lane's out += factor * sum by offset of rel[offset], and the table's
  // gradient += factor * sum by offset of x_lane. Either may be left out.
  void spread(const Tile<M>& t, const Acc* rows, Acc* out, bool with_grad) {
    const int64_t n = extent(t), ld = table.ld_rows;
    for (int v = 0; v < t.vectors; ++v) {
      const int lane = t.lane_of(v);
      int64_t least, most;
      last_index(t, lane, &least, &most);
      const int64_t width = n + most - least, start = first(t) - most;
      for (int l = 0; l < W; ++l)
        for (int64_t c = 0; c < width; c += W) store(skewed + l * ld_skewed + c, Vec<Acc>{});
      for (int64_t w = 0; w < n; w += W) {
        Vec<Acc> square[W];
        for (int64_t i = 0; i < W; ++i)
          square[i] = w + i < n ? load(sums + (w + i) * kPanels * L + lane) * factor : Vec<Acc>{};
        transpose(square);
        for (int l = 0; l < W; ++l)
          if (t.active[lane + l]) store(skewed + l * ld_skewed + w + most - index(t)[lane + l], square[l]);
      }
      const int64_t low = max(0, 1 - table.reach - start), high = min(width, table.reach - start);
      if (high <= low) continue;
      if (out) table.add_rows(skewed + low, ld_skewed, W, start + low, high - low, 0, ld, out + lane * ld, ld);
      if (with_grad) table.add_products(skewed + low, ld_skewed, W, start + low, high - low, rows + lane * ld);
    }
  }
};

template <class M>
struct WalkTerm {
  using Acc = typename M::Acc;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;
  static constexpr int64_t kRows = 2 * rows_of(kVectors);

  bool on;
  int axis;
  int slot;  // where its table's gradient goes
  Acc factor;
  Vectors<Acc> table;
  Acc *values, *sums;      // [walked position][offset - first]
  int64_t ld, first;       // of the block in hand
  int64_t lane_0, lane_n;  // the tile's lanes lie in [lane_0, lane_n]

  WalkTerm(Arena& arena, bool on, bool sums, int axis, int slot, int64_t reach, int64_t channels, int64_t walked,
           int64_t resident)
      : on(on),
        axis(axis),
        slot(slot),
        factor(1),
        table(arena, on, sums, reach, channels),
        values(arena.take<Acc>(on ? kBlock * row_length(walked, resident) : 0)),
        sums(arena.take<Acc>(on && sums ? kBlock * row_length(walked, resident) : 0)),
        ld(row_length(walked, resident)),
        first(0),
        lane_0(0),
        lane_n(0) {}

  static int64_t row_length(int64_t walked, int64_t resident) { return padded<Acc>(walked + resident + W) + L; }

  const Index<Acc>* index(const Tile<M>& t) const { return axis ? t.x : t.y; }
  const Index<Acc>* walked_index(const Block<Acc>& block) const { return axis ? block.x : block.y; }

  // Call f(row, rows, first offset, offsets) for a few rows of the block at a time: their offsets are little more than
  // those of one.
  template <class F>
  VISATTN_INLINE void groups(const Block<Acc>& block, F f) const {
    const Index<Acc>* walked = walked_index(block);
    for (int64_t r = 0; r < block.n; r += kRows) {
      const int64_t n = min(kRows, block.n - r);
      int64_t least = walked[r], most = least;
      for (int64_t i = r; i < r + n; ++i) least = min(least, walked[i]), most = max(most, walked[i]);
      f(r, n, lane_0 - most, lane_n - least - (lane_0 - most) + 1);
    }
  }

  // To be called for each block: values[r][lane - walked] = factor * x_r · rel[lane - walked], from the block's rows
  // [position][ld_rows].
  void read(const Tile<M>& t, const Block<Acc>& block, const Acc* rows) {
    const Index<Acc>* walked = walked_index(block);
    lane_0 = lane_n = index(t)[0];
    for (int v = 0; v < t.vectors; ++v)
      for (int l = t.lane_of(v), end = l + W; l < end; ++l)
        lane_0 = min(lane_0, index(t)[l]), lane_n = max(lane_n, index(t)[l]);
    first = lane_0 - walked[0];
    for (int64_t r = 0; r < block.n; ++r) first = min(first, lane_0 - walked[r]);
    groups(block, [&](int64_t r, int64_t n, int64_t start, int64_t columns) {
      table.products(rows + r * table.ld_rows, {table.ld_rows, 1}, n, start, columns, values + r * ld + start - first,
                     ld, factor);
    });
  }

  void start_sums(const Block<Acc>& block) {
    groups(block, [&](int64_t r, int64_t n, int64_t start, int64_t columns) {
      for (int64_t i = r; i < r + n; ++i)
        for (int64_t c = 0; c < columns; c += W) store(sums + i * ld + start - first + c, Vec<Acc>{});
    });
  }

  // The other way round: sums[r][lane - walked] += source[r][lane] for rows [from, to) of one vector.
  void sum(const Tile<M>& t, const Block<Acc>& block, int v, int lane, int64_t from, int64_t to, const Acc* source) {
    const Index<Acc>*walked = walked_index(block), *lanes = index(t) + lane;
    const Spread spread = t.active[lane + W - 1] ? (axis ? t.spread_x[v] : t.spread_y[v]) : Spread::kAny;
    for (int64_t r = from; r < to; ++r) {
      Acc* p = sums + r * ld - walked[r] - first;
      const Acc* x = source + r * L;
      if (spread == Spread::kConsecutive)
        store(p + lanes[0], load(p + lanes[0]) + load(x));
      else if (spread == Spread::kUniform)
        p[lanes[0]] += sum_of_lanes(load(x));
      else
        for (int l = 0; l < W; ++l) p[lanes[l]] += t.active[lane + l] ? x[l] : Acc(0);
    }
  }

  // From the sums: each walked position's out += factor * sum by offset of rel[offset], and the table's gradient
  // += factor * sum by offset of x_r, from the block's rows. Either may be left out; out is
  // [channel / L][kBlock][channel % L].
  void spread(const Block<Acc>& block, const Acc* rows, Acc* out, bool with_grad) {
    groups(block, [&](int64_t r, int64_t n, int64_t start, int64_t columns) {
      Acc* by_offset = sums + r * ld + start - first;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < columns; c += W) store(by_offset + i * ld + c, load(by_offset + i * ld + c) * factor);
      const int64_t low = max(0, 1 - table.reach - start), high = min(columns, table.reach - start);
      if (high <= low) return;
      by_offset += low, start += low;
      for (int64_t c = 0; out && c < table.channels; c += L)
        table.add_rows(by_offset, ld, n, start, high - low, c, min(L, table.channels - c),
                       out + (c / L * kBlock + r) * L, L);
      if (with_grad) table.add_products(by_offset, ld, n, start, high - low, rows + r * table.ld_rows);
    });
  }

  // scores[r][lane] += values for rows [from, to) of one vector.
  VISATTN_INLINE void add(const Tile<M>& t, const Block<Acc>& block, int v, int lane, int64_t from, int64_t to,
                          Acc* scores) const {
    const Index<Acc>*walked = walked_index(block), *lanes = index(t) + lane;
    const Spread spread = axis ? t.spread_x[v] : t.spread_y[v];
    const auto offsets = load(lanes) - lanes[0];
    for (int64_t r = from; r < to; ++r) {
      const Acc* p = values + r * ld + lanes[0] - walked[r] - first;
      const Vec<Acc> x = spread == Spread::kUniform       ? broadcast(*p)
                         : spread == Spread::kConsecutive ? load(p)
                                                          : gather(p, offsets);
      store(scores + r * L, load(scores + r * L) + x);
    }
  }
};

template <class M>
struct BiasTerm {
  using Acc = typename M::Acc;
  static constexpr int L = kTile<M>, W = kLanes<Acc>;
  static constexpr int64_t kMaxBytes = 1 << 20;  // of the spread table

  bool on, summing;  // summing: the gradient of the table too
  int64_t reach_h, reach_w, columns, size;
  Acc *table, *values, *sums, *grad;
  int64_t capacity;  // rows of `values` and `sums`
  bool flip;         // whether the lanes are keys
  // What `values` holds: all the rows of a box relative to the tile, or those of one block.
  bool whole, filled;
  Box box;
  int64_t lane_width, lane_x, lane_count;
  int lane_vectors;

  // `rows`: the most walked positions around a tile, by index relative to its first lane.
  BiasTerm(Arena& arena, bool on, bool summing, bool queries, int64_t reach_h, int64_t reach_w, int64_t rows)
      : on(on),
        summing(on && summing),
        reach_h(reach_h),
        reach_w(reach_w),
        columns(table_entries(reach_w)),
        size(table_entries(reach_h) * columns),
        table(arena.take<Acc>(on ? size : 0)),
        flip(!queries),
        filled(false),
        box{0, 0, 0, 0},
        lane_width(0),
        lane_x(0),
        lane_count(0),
        lane_vectors(0) {
    whole = rows * kPanels * L * int64_t(sizeof(Acc)) <= kMaxBytes;
    capacity = whole ? rows : kBlock;
    values = arena.take<Acc>(on ? capacity * kPanels * L : 0);
    sums = arena.take<Acc>(this->summing ? capacity * kPanels * L : 0);
    grad = arena.take<Acc>(this->summing ? size : 0);
  }

  template <class T>
  void load_table(const Table& from, int64_t head) {
    for (int64_t y = 0; y < table_entries(reach_h); ++y)
      for (int64_t x = 0; x < columns; ++x)
        table[y * columns + x] = widen(((const T*)from.data)[head * from.head + y * from.entry + x * from.column]);
    filled = false;
  }

  // The entry of an offset of indices, walked minus lane. Pairs that the pattern does not have may lie outside the
  // table; they are masked afterwards, and get any entry.
  VISATTN_INLINE int64_t entry(int64_t y, int64_t x) const {
    const int64_t e = (flip ? -y : y) * columns + (flip ? -x : x) + (reach_h - 1) * columns + reach_w - 1;
    return e < 0 ? 0 : e >= size ? size - 1 : e;
  }

  template <class F>
  VISATTN_INLINE void each_lane(const Tile<M>& t, F f) const {
    for (int v = 0; v < t.vectors; ++v)
      for (int l = t.lane_of(v), end = l + W; l < end; ++l) f(l);
  }

  // As `entry`, a vector of lanes at a time.
  void fill_row(const Tile<M>& t, int64_t y, int64_t x, Acc* row) const {
    const int64_t walked = y * columns + x, middle = (reach_h - 1) * columns + reach_w - 1;
    for (int v = 0; v < t.vectors; ++v) {
      const int lane = t.lane_of(v);
      const auto lanes = load(t.y + lane) * Index<Acc>(columns) + load(t.x + lane);
      auto e = flip ? lanes + Index<Acc>(middle - walked) : Index<Acc>(middle + walked) - lanes;
      e = e < 0 ? e - e : e;
      e = e >= Index<Acc>(size) ? e - e + Index<Acc>(size - 1) : e;
      store(row + lane, gather(table, e));
    }
  }

  void add_row(const Tile<M>& t, int64_t y, int64_t x, const Acc* row) {
    each_lane(t, [&](int l) {
      if (t.active[l] || t.masked) grad[entry(y - t.y[l], x - t.x[l])] += row[l];
    });
  }

  // Make the rows of a tile's box, unless those that are there will do. `near`: of a tile that differs from others only
  // by where it lies, so that rows for every offset within reach serve all of them.
  void read(const Tile<M>& t, bool near_y, bool near_x) {
    if (!whole) return;
    Box want{t.box.y - t.origin_y, t.box.x - t.origin_x, t.box.h, t.box.w};
    if (near_y) want.y = 1 - reach_h, want.h = lane_extent(t, t.y, t.origin_y) + 2 * (reach_h - 1);
    if (near_x) want.x = 1 - reach_w, want.w = lane_extent(t, t.x, t.origin_x) + 2 * (reach_w - 1);
    const int64_t width = near_y || near_x ? 0 : t.resident_x.count, start = near_y || near_x ? 0 : t.origin_x;
    const int64_t count = t.masked ? 0 : t.count;  // masked lanes add nothing
    if (filled && want.y == box.y && want.x == box.x && want.h == box.h && want.w == box.w && width == lane_width &&
        start == lane_x && count == lane_count && t.vectors == lane_vectors)
      return;
    flush();
    box = want, lane_width = width, lane_x = start, lane_count = count, lane_vectors = t.vectors, filled = true;
    shape = t;
    for (int64_t y = 0, r = 0; y < box.h; ++y)
      for (int64_t x = 0; x < box.w; ++x, ++r)
        fill_row(t, t.origin_y + box.y + y, t.origin_x + box.x + x, values + r * kPanels * L);
    if (summing)
      for (int64_t i = 0; i < box.size() * kPanels * L; ++i) sums[i] = 0;
  }

  static int64_t lane_extent(const Tile<M>& t, const Index<Acc>* index, int64_t origin) {
    int64_t most = origin;
    for (int v = 0; v < t.vectors; ++v)
      for (int l = t.lane_of(v), end = l + W; l < end; ++l) most = max(most, index[l]);
    return most - origin + 1;
  }

  // To be called before each block.
  void read_block(const Tile<M>& t, const Block<Acc>& block) {
    if (whole) return;
    for (int64_t r = 0; r < block.n; ++r) fill_row(t, block.y[r], block.x[r], values + r * kPanels * L);
    if (summing)
      for (int64_t i = 0; i < block.n * kPanels * L; ++i) sums[i] = 0;
  }

  // To be called after each block whose sums were added to.
  void flush_block(const Tile<M>& t, const Block<Acc>& block) {
    if (whole) return;
    for (int64_t r = 0; r < block.n; ++r) add_row(t, block.y[r], block.x[r], sums + r * kPanels * L);
  }

  VISATTN_INLINE int64_t row(const Tile<M>& t, const Block<Acc>& block, int64_t r) const {
    if (!whole) return r * kPanels * L;
    return ((block.y[r] - t.origin_y - box.y) * box.w + block.x[r] - t.origin_x - box.x) * kPanels * L;
  }

  void start_grad() {
    for (int64_t i = 0; i < size; ++i) grad[i] = 0;
  }

  // Move what was summed by position into the gradient by entry.
  void flush() {
    if (!summing || !whole || !filled) return;
    for (int64_t y = 0, r = 0; y < box.h; ++y)
      for (int64_t x = 0; x < box.w; ++x, ++r)
        add_row(shape, shape.origin_y + box.y + y, shape.origin_x + box.x + x, sums + r * kPanels * L);
    filled = false;
  }

  void add_grad(Acc* share) const {
    for (int64_t i = 0; i < size; ++i) share[i] += grad[i];
  }

 private:
  Tile<M> shape;  // the tile that `values` was made for
};

}  // namespace visattn::cpu::VISATTN_ISA
