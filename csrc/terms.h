// Terms: what is added to scores and values, as pointers and strides, and where an offset's entry lies. Host and
// device; no torch.
//
// A relative table has one entry per offset (key minus query) from -(K - 1) to K - 1, where K is the pattern's reach.
#pragma once

#include "pattern.h"

namespace visattn {

VISATTN_HD int64_t table_entries(int64_t reach) { return 2 * reach - 1; }
VISATTN_HD int64_t table_entry(int64_t offset, int64_t reach) { return offset + reach - 1; }

// A relative table [heads, entries, columns] of any strides; the stride of heads is 0 where they share it. The bias
// table's entries are those of the height, its columns those of the width. Null where a call has no such term.
struct Table {
  void* data = nullptr;
  int64_t head = 0, entry = 0, column = 0;
};

// The vector tables of a call, each for the height (0) and the width (1).
enum VectorTerm { kQueryTerm, kKeyTerm, kValueTerm, kVectorTerms };

// The gradients of the relative tables, in the order of the operators' schemas.
constexpr int kTables = 7;  // bias, then query, key, value, each for height and width

VISATTN_HD int table_slot(VectorTerm term, int axis) { return 1 + 2 * int(term) + axis; }

}  // namespace visattn
