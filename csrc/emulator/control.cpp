// The operator visattn_emulator::control, for tests: the schedule of the emulated kernels, and where grids fold.
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "emulator.h"

namespace {

void control(int64_t schedule, int64_t max_grid_x) {
  using namespace visattn::emulator;
  if (schedule < 0 || schedule >= kScheduleCount) throw std::invalid_argument("no such schedule");
  settings().schedule = int(schedule);
  settings().max_grid_x = max_grid_x > 0 ? max_grid_x : kMaxGridX;
}

}  // namespace

STABLE_TORCH_LIBRARY(visattn_emulator, m) { m.def("control(int schedule, int max_grid_x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(visattn_emulator, CompositeExplicitAutograd, m) { m.impl("control", TORCH_BOX(&control)); }
