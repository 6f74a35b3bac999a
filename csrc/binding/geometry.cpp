// The Python module `geometry`, for tests alone: pattern.h and terms.h as they are, and walks over all pairs of a part
// as a kernel makes them. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "../terms.h"

namespace py = pybind11;

namespace visattn {
namespace {

using Pair = std::array<int64_t, 2>;  // height, width
using Quad = std::array<int64_t, 4>;  // a box: y, x, h, w

Pattern pattern_of(const std::vector<int64_t>& f) {
  if (f.size() != kPatternFields)
    throw std::invalid_argument("a pattern has " + std::to_string(kPatternFields) + " fields");
  return {PatternKind(f[0]), f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9]};
}

Box box_of(const Quad& b) { return {b[0], b[1], b[2], b[3]}; }
Quad quad(const Box& b) { return {b.y, b.x, b.h, b.w}; }
Pair pair(const Range& r) { return {r.first, r.end}; }

// Indices of a line whose positions lie `before` ahead of its axis and `after` behind it at most.
Range indices(const Line& line, int64_t length, int64_t before, int64_t after) {
  return {-((line.start + before) / line.step),
          line.count + (length - 1 + after - line.at(line.count - 1)) / line.step};
}

Box all_of(const Grid& grid) { return {0, 0, grid.h, grid.w}; }

enum class Walk { kOfQueries, kOfKeys, kAll };

// How often a walk over the pairs of a part meets each, [H, W, before + Hk + after, before + Wk + after], flat: over
// the box of keys of every query, over the box of queries of every key of the grid, or over everything; by `member`
// each time.
py::array_t<int64_t> pairs(const Part& part, const Pair& before, const Pair& after, Walk walk) {
  const Pair keys{part.y.keys, part.x.keys};
  const Pair shape{before[0] + keys[0] + after[0], before[1] + keys[1] + after[1]};
  py::array_t<int64_t> result(part.y.queries * part.x.queries * shape[0] * shape[1]);
  int64_t* const counts = result.mutable_data();
  std::fill(counts, counts + result.size(), 0);
  for (int64_t c = 0; c < part.classes(); ++c) {
    const Region region = region_of(part, c);
    const auto meet = [&](int64_t qy, int64_t qx, int64_t ky, int64_t kx) {
      if (!part.member(qy, qx, ky, kx, region.key_y.count, region.key_x.count)) return;
      const int64_t y = region.query_y.at(qy), x = region.query_x.at(qx);
      const int64_t row = region.key_y.at(ky) + before[0], column = region.key_x.at(kx) + before[1];
      if (y < 0 || y >= part.y.queries || x < 0 || x >= part.x.queries || row < 0 || row >= shape[0] || column < 0 ||
          column >= shape[1])
        throw std::out_of_range("a pair outside of the grids");
      ++counts[((y * part.x.queries + x) * shape[0] + row) * shape[1] + column];
    };
    const auto each = [](const Box& box, auto f) {
      for (int64_t y = box.y; y < box.y + box.h; ++y)
        for (int64_t x = box.x; x < box.x + box.w; ++x) f(y, x);
    };
    if (walk == Walk::kOfKeys) {
      each(all_of(region.keys()), [&](int64_t ky, int64_t kx) {
        each(queries_of(part, region, {ky, kx, 1, 1}), [&](int64_t qy, int64_t qx) { meet(qy, qx, ky, kx); });
      });
      continue;
    }
    const Range rows = indices(region.key_y, keys[0], before[0], after[0]);
    const Range columns = indices(region.key_x, keys[1], before[1], after[1]);
    const Box everything{rows.first, columns.first, rows.size(), columns.size()};
    each(all_of(region.queries()), [&](int64_t qy, int64_t qx) {
      const Box box = walk == Walk::kAll ? everything : keys_of(part, region, {qy, qx, 1, 1});
      each(box, [&](int64_t ky, int64_t kx) { meet(qy, qx, ky, kx); });
    });
  }
  return result;
}

// Every box of queries (or of keys) of a region and the box that it walks, flat rows of 8.
py::array_t<int64_t> boxes(const Part& part, const Region& region, bool queries) {
  const Grid grid = queries ? region.queries() : region.keys();
  std::vector<int64_t> rows;
  for (int64_t y = 0; y < grid.h; ++y)
    for (int64_t x = 0; x < grid.w; ++x)
      for (int64_t h = 1; y + h <= grid.h; ++h)
        for (int64_t w = 1; x + w <= grid.w; ++w) {
          const Box box{y, x, h, w}, walked = queries ? keys_of(part, region, box) : queries_of(part, region, box);
          rows.insert(rows.end(), {y, x, h, w, walked.y, walked.x, walked.h, walked.w});
        }
  return py::array_t<int64_t>(py::ssize_t(rows.size()), rows.data());
}

}  // namespace
}  // namespace visattn

PYBIND11_MODULE(geometry, m) {
  using namespace visattn;
  // Local to the module, so that a process can load another build of it.
  const py::module_local local;

  py::class_<Line>(m, "Line", local)
      .def_readonly("start", &Line::start)
      .def_readonly("step", &Line::step)
      .def_readonly("count", &Line::count)
      .def("at", &Line::at);

  py::class_<Axis>(m, "Axis", local)
      .def("near", &Axis::near)
      .def("classes", &Axis::classes)
      .def("class_of", &Axis::class_of)
      .def("index_of", &Axis::index_of)
      .def("query_line", &Axis::query_line)
      .def("key_line", &Axis::key_line)
      .def("longest", &Axis::longest)
      .def("keys_of", [](const Axis& a, int64_t i, int64_t n) { return pair(a.keys_of(i, n)); })
      .def("queries_of", [](const Axis& a, int64_t j, int64_t n) { return pair(a.queries_of(j, n)); });

  py::class_<Region>(m, "Region", local)
      .def_readonly("query_y", &Region::query_y)
      .def_readonly("query_x", &Region::query_x)
      .def_readonly("key_y", &Region::key_y)
      .def_readonly("key_x", &Region::key_x);

  py::enum_<Walk>(m, "Walk", local)
      .value("OF_QUERIES", Walk::kOfQueries)
      .value("OF_KEYS", Walk::kOfKeys)
      .value("ALL", Walk::kAll);

  py::class_<Part>(m, "Part", local)
      .def_readonly("y", &Part::y)
      .def_readonly("x", &Part::x)
      .def_readonly("others", &Part::others)
      .def("near", &Part::near)
      .def("classes", &Part::classes)
      .def("region_of", [](const Part& part, int64_t c) { return region_of(part, c); })
      .def("member", &Part::member)
      .def("keys_of", [](const Part& p, const Region& r, const Quad& box) { return quad(keys_of(p, r, box_of(box))); })
      .def("queries_of",
           [](const Part& p, const Region& r, const Quad& box) { return quad(queries_of(p, r, box_of(box))); })
      .def("pairs", &pairs)
      .def("boxes", &boxes);

  m.def("parts", [](const std::vector<int64_t>& fields) { return parts(pattern_of(fields)); });
  m.def("part_of", [](const std::vector<int64_t>& fields, int part, const Pair& queries, const Pair& keys) {
    return part_of(pattern_of(fields), part, {queries[0], queries[1]}, {keys[0], keys[1]});
  });
  m.def("reach_of", [](const std::vector<int64_t>& fields, int axis, int64_t length) {
    return reach_of(pattern_of(fields), axis, length);
  });
  m.def("table_entries", &table_entries);
  m.def("table_entry", &table_entry);
}
