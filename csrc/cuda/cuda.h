// The CUDA backend as C++ sees it: which cells there are, and launches of them. No torch, no CUDA header.
//
// A cell is a kernel compiled for a dtype, D, Dv and a kind. setup.py names them (from
// visattn_kernels/backends/cells.py) and compiles instantiate.cuh once for each dtype, pass, D and Dv.
#pragma once

#include <cstdint>

#include "plan.h"

namespace visattn::cuda {

enum class Numbers : int { kFloat32, kTf32, kBFloat16, kFloat16 };
constexpr int kNumbers = 4;

using Launch = const char* (*)(const Call& call, const Plan& plan, void* stream);

struct Entry {
  int d, dv;  // 0, 0: any
  Kind kind;
  Launch launch;
};

// The entries of one file, ended by one whose launch is null; and the files of a dtype and pass, ended by null.
using CellTable = const Entry* (*)();
const CellTable* cells(Numbers numbers, Pass pass);

// The least kind of kernel that a call needs.
Kind kind_of(const Call& call);

// A plan of the pass, for the least cell that has the call's kind, or a null launch if there is none.
struct Chosen {
  Launch launch;
  Plan plan;
};
Chosen choose(const Call& call, Pass pass, Numbers numbers);

}  // namespace visattn::cuda
