// The Python module `emulated`, for tests alone: each primitive of csrc/cuda/prims.h on registers given from Python,
// and small kernels, most of them faulty, that show what the emulator reports. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/prims.h"

namespace py = pybind11;

namespace visattn::cuda {
namespace {

using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

constexpr int kOutputs = 4;

void check(const char* error) {
  if (error) throw std::invalid_argument(error);
}

// Thread i calls a primitive with row i of the inputs, and with rows i + threads, ...
struct Rows {
  const uint32_t* in;
  int64_t rows, columns;
  uint32_t* out;  // [rows, kOutputs]
  const char* memory;
  int64_t bytes;  // that are in shared memory before
  int threads;
};

template <class Op>
VISATTN_KERNEL(1024, 1)
rows_kernel(const Rows args) {
  for (int64_t i = thread(); i < args.bytes; i += args.threads) shared_memory()[i] = args.memory[i];
  sync_block();
  for (int64_t i = thread(); i < args.rows; i += args.threads)
    Op::call(args.in + i * args.columns, args.out + i * kOutputs);
}

void store(const float (&d)[4], uint32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = as_bits(d[i]);
}

template <bool transposed>
struct LoadMatrix {  // in: the row's offset in shared memory
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) {
    uint32_t r[4];
    if (transposed)
      ldmatrix_transposed(r, shared_memory() + in[0]);
    else
      ldmatrix(r, shared_memory() + in[0]);
    std::copy(r, r + 4, out);
  }
};

template <class Op>
struct Multiply {  // in: d, a, b
  static constexpr int kInputs = 10;
  static void call(const uint32_t* in, uint32_t* out) {
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = as_float(in[i]);
    const uint32_t a[4] = {in[4], in[5], in[6], in[7]};
    Op::multiply(d, a, in[8], in[9]);
    store(d, out);
  }
};

using Fragment = const uint32_t (&)[4];
template <class T>
struct K16 {
  static void multiply(float (&d)[4], Fragment a, uint32_t b0, uint32_t b1) { mma_k16<T>(d, a, b0, b1); }
};
template <class T>
struct K8 {
  static void multiply(float (&d)[4], Fragment a, uint32_t b0, uint32_t) { mma_k8<T>(d, a[0], a[1], b0); }
};
struct Tf32 {
  static void multiply(float (&d)[4], Fragment a, uint32_t b0, uint32_t b1) { mma_tf32(d, a, b0, b1); }
};
struct Fp32 {
  static void multiply(float (&d)[4], Fragment a, uint32_t b0, uint32_t b1) { mma_fp32(d, a, b0, b1); }
};

struct Shuffle {  // in: a value, a lane; out: as uint32_t, int and float
  static constexpr int kInputs = 2;
  static void call(const uint32_t* in, uint32_t* out) {
    out[0] = shuffle(in[0], int(in[1]));
    out[1] = uint32_t(shuffle(int(in[0]), int(in[1])));
    out[2] = as_bits(shuffle(as_float(in[0]), int(in[1])));
  }
};
struct ShuffleXor {
  static constexpr int kInputs = 2;
  static void call(const uint32_t* in, uint32_t* out) {
    out[0] = shuffle_xor(in[0], int(in[1]));
    out[1] = uint32_t(shuffle_xor(int(in[0]), int(in[1])));
    out[2] = as_bits(shuffle_xor(as_float(in[0]), int(in[1])));
  }
};
struct Any {  // in: a predicate; out: of the warp, of the block, and of the block again
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) {
    out[0] = warp_any(in[0] != 0);
    out[1] = sync_block_or(in[0] != 0);
    out[2] = sync_block_or(false);
  }
};
struct Place {
  static constexpr int kInputs = 1;
  static void call(const uint32_t*, uint32_t* out) {
    out[0] = uint32_t(thread());
    out[1] = uint32_t(lane());
    out[2] = uint32_t(warp());
    out[3] = uint32_t(block());
  }
};

template <class T>
struct ToFloat {
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) { out[0] = as_bits(to_float(T{uint16_t(in[0])})); }
};
template <class T>
struct FromFloat {
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) { out[0] = from_float<T>(as_float(in[0])).bits; }
};
struct SameFloat {
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) {
    out[0] = as_bits(to_float(as_float(in[0])));
    out[1] = as_bits(from_float<float>(as_float(in[0])));
  }
};
template <class T>
struct Pack {
  static constexpr int kInputs = 2;
  static void call(const uint32_t* in, uint32_t* out) { out[0] = pack<T>(as_float(in[0]), as_float(in[1])); }
};
struct ToTf32 {
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) { out[0] = to_tf32(as_float(in[0])); }
};
struct Exp2 {
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) { out[0] = as_bits(exp2_fast(as_float(in[0]))); }
};
struct Log2 {
  static constexpr int kInputs = 1;
  static void call(const uint32_t* in, uint32_t* out) { out[0] = as_bits(log2_fast(as_float(in[0]))); }
};

struct Entry {
  void (*kernel)(Rows);
  int inputs;
};

template <class Op>
constexpr Entry entry() {
  return {&rows_kernel<Op>, Op::kInputs};
}

const std::map<std::string, Entry> kOps = {
    {"ldmatrix", entry<LoadMatrix<false>>()},
    {"ldmatrix_transposed", entry<LoadMatrix<true>>()},
    {"mma_k16 f16", entry<Multiply<K16<Half>>>()},
    {"mma_k16 bf16", entry<Multiply<K16<BFloat16>>>()},
    {"mma_k8 f16", entry<Multiply<K8<Half>>>()},
    {"mma_k8 bf16", entry<Multiply<K8<BFloat16>>>()},
    {"mma_tf32", entry<Multiply<Tf32>>()},
    {"mma_fp32", entry<Multiply<Fp32>>()},
    {"shuffle", entry<Shuffle>()},
    {"shuffle_xor", entry<ShuffleXor>()},
    {"any", entry<Any>()},
    {"place", entry<Place>()},
    {"to_float f16", entry<ToFloat<Half>>()},
    {"to_float bf16", entry<ToFloat<BFloat16>>()},
    {"from_float f16", entry<FromFloat<Half>>()},
    {"from_float bf16", entry<FromFloat<BFloat16>>()},
    {"float", entry<SameFloat>()},
    {"pack f16", entry<Pack<Half>>()},
    {"pack bf16", entry<Pack<BFloat16>>()},
    {"to_tf32", entry<ToTf32>()},
    {"exp2_fast", entry<Exp2>()},
    {"log2_fast", entry<Log2>()},
};

Words run(const std::string& name, const Words& in, int threads, const std::string& memory) {
  const Entry op = kOps.at(name);
  if (in.ndim() != 2 || in.shape(1) != op.inputs)
    throw std::invalid_argument(name + " takes rows of " + std::to_string(op.inputs));
  Words out({in.shape(0), py::ssize_t(kOutputs)});
  std::fill(out.mutable_data(), out.mutable_data() + out.size(), 0);
  const std::vector<char> exact(memory.begin(), memory.end());
  const Rows args{in.data(),    in.shape(0),           in.shape(1), out.mutable_data(),
                  exact.data(), int64_t(exact.size()), threads};
  check(launch(op.kernel, args, 1, threads, memory.size(), nullptr));
  return out;
}

// Lanes of a warp carry out a list of steps, one lane and one step at a time.
enum class Do { kCopy, kZero, kCommit, kWait, kLook };

struct Steps {
  const std::array<int64_t, 4>* steps;  // lane, Do, and for a copy to and from, for a wait how many may be pending
  int64_t count;
  const char* memory;
  int64_t bytes;  // of shared memory
  std::vector<std::string>* looks;
};

void wait(int64_t pending) {
  switch (pending) {
    case 0:
      return copy_wait<0>();
    case 1:
      return copy_wait<1>();
    default:
      return copy_wait<2>();
  }
}

VISATTN_KERNEL(32, 1)
steps_kernel(const Steps args) {
  for (int64_t i = 0; i < args.count; ++i) {
    const auto [by, what, to, from] = args.steps[i];
    if (by == lane()) {
      if (Do(what) == Do::kCopy) copy_async(shared_memory() + to, args.memory + from, true);
      if (Do(what) == Do::kZero) copy_async(shared_memory() + to, args.memory + from, false);
      if (Do(what) == Do::kCommit) copy_commit();
      if (Do(what) == Do::kWait) wait(to);
      if (Do(what) == Do::kLook) args.looks->emplace_back(shared_memory(), args.bytes);
    }
    sync_warp();
  }
}

// What lies in shared memory at each look.
std::vector<py::bytes> copies(const std::string& memory, int64_t shared,
                              const std::vector<std::array<int64_t, 4>>& list) {
  std::vector<std::string> looks;
  struct Aligned {
    alignas(16) char bytes[16];
  };
  std::vector<Aligned> source((memory.size() + 15) / 16);
  if (!memory.empty()) std::copy(memory.begin(), memory.end(), source[0].bytes);
  const Steps args{list.data(), int64_t(list.size()), reinterpret_cast<const char*>(source.data()), shared, &looks};
  check(launch(steps_kernel, args, 1, 32, size_t(shared), nullptr));
  return {looks.begin(), looks.end()};
}

struct Fault {
  uint32_t* out;       // [threads]
  const char* memory;  // 16 bytes of 1
};

constexpr int kFaultThreads = 64;
constexpr size_t kFaultShared = 1040;
constexpr int kOdd = 35;  // the thread that errs: lane 3 of warp 1

using FaultKernel = void (*)(Fault);

void barrier_exit(const Fault) {
  if (thread() == kOdd) return;
  sync_block();
}
void barrier_apart(const Fault) {
  if (thread() == kOdd)
    sync_block();
  else
    sync_block();
}
void barrier_kind(const Fault) {
  if (warp() == 1)
    sync_block();
  else
    sync_block_or(false);
}
void barrier_and_mma(const Fault) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (thread() == kOdd)
    sync_block();
  else
    mma_k16<Half>(d, a, 0, 0);
}
void shuffle_skipped(const Fault args) {
  uint32_t x = uint32_t(thread());
  if (thread() != kOdd) x = shuffle(x, 0);
  sync_warp();
  args.out[thread()] = x;
}
void shuffle_exit(const Fault) {
  if (thread() == kOdd) return;
  shuffle(1.0f, 0);
}
void shuffle_uneven(const Fault) {
  for (int i = 0; i < 2 + (thread() == kOdd); ++i) shuffle_xor(i, 1);
}
void ldmatrix_unaligned(const Fault) {
  uint32_t r[4];
  ldmatrix(r, shared_memory() + 16 * lane() + (thread() == kOdd ? 8 : 0));
}
void ldmatrix_outside(const Fault) {
  uint32_t r[4];
  ldmatrix_transposed(r, shared_memory() + (thread() == kOdd ? kFaultShared : 0));
}
void ldmatrix_global(const Fault args) {
  uint32_t r[4];
  ldmatrix(r, args.memory);
}
void copy_to_unaligned(const Fault args) { copy_async(shared_memory() + 4, args.memory, true); }
void copy_from_unaligned(const Fault args) { copy_async(shared_memory(), args.memory + 4, true); }
void copy_outside(const Fault args) { copy_async(shared_memory() + kFaultShared, args.memory, true); }
void write_beyond(const Fault) {
  if (thread() == kOdd) shared_memory()[kFaultShared + 3] = 0;
}
void write_before(const Fault) {
  if (thread() == kOdd) shared_memory()[-1] = 0;
}
void read_beyond(const Fault args) {
  std::memset(shared_memory() + 16 * thread(), 0, 16);
  std::memset(shared_memory() + kFaultShared - 16, 0, 16);
  sync_block();
  std::memcpy(&args.out[thread()], shared_memory() + 16 * (thread() + 2), 4);  // the last one is too far
}
void read_unwritten(const Fault args) { std::memcpy(&args.out[thread()], shared_memory() + 4 * thread(), 4); }
void read_before_wait(const Fault args) {
  copy_async(shared_memory() + 16 * thread(), args.memory, true);
  copy_commit();
  std::memcpy(&args.out[thread()], shared_memory() + 16 * thread(), 4);
  copy_wait<0>();
}
void read_before_barrier(const Fault args) {
  copy_async(shared_memory() + 16 * thread(), args.memory, true);
  copy_commit();
  copy_wait<0>();
  std::memcpy(&args.out[thread()], shared_memory() + 16 * (kFaultThreads - 1 - thread()), 4);
}
void copy_from_beyond(const Fault args) {
  copy_async(shared_memory() + 16 * thread(), args.memory + 16 * thread(), true);  // of 16 bytes
  copy_commit();
  copy_wait<0>();
}

const std::map<std::string, FaultKernel> kFaults = {
    {"barrier_exit", barrier_exit},
    {"barrier_apart", barrier_apart},
    {"barrier_kind", barrier_kind},
    {"barrier_and_mma", barrier_and_mma},
    {"shuffle_skipped", shuffle_skipped},
    {"shuffle_exit", shuffle_exit},
    {"shuffle_uneven", shuffle_uneven},
    {"ldmatrix_unaligned", ldmatrix_unaligned},
    {"ldmatrix_outside", ldmatrix_outside},
    {"ldmatrix_global", ldmatrix_global},
    {"copy_to_unaligned", copy_to_unaligned},
    {"copy_from_unaligned", copy_from_unaligned},
    {"copy_outside", copy_outside},
    {"write_beyond", write_beyond},
    {"write_before", write_before},
    {"read_beyond", read_beyond},
    {"read_unwritten", read_unwritten},
    {"read_before_wait", read_before_wait},
    {"read_before_barrier", read_before_barrier},
    {"copy_from_beyond", copy_from_beyond},
};

std::vector<uint32_t> fault(const std::string& name) {
  std::vector<uint32_t> out(kFaultThreads);
  struct alignas(16) Memory {
    char bytes[16];
  };
  const auto memory = std::make_unique<Memory>();
  std::fill(memory->bytes, memory->bytes + 16, 1);
  check(launch(kFaults.at(name), Fault{out.data(), memory->bytes}, 1, kFaultThreads, kFaultShared, nullptr));
  return out;
}

// Each of two warps reads, stage after stage, what the other has written into a buffer that both use again.
struct Reuse {
  uint32_t* out;  // [stages, 64]
  int stages;
  bool barrier;  // after the reads
};

VISATTN_KERNEL(64, 1)
reuse_kernel(const Reuse args) {
  uint32_t* const buffer = reinterpret_cast<uint32_t*>(shared_memory());
  for (int stage = 0; stage < args.stages; ++stage) {
    buffer[thread()] = uint32_t(100 * stage + thread());
    sync_block();
    sync_warp();
    args.out[64 * stage + thread()] = buffer[thread() ^ 32];
    if (args.barrier) sync_block();
  }
}

std::vector<uint32_t> reuse(int stages, bool barrier) {
  std::vector<uint32_t> out(64 * size_t(stages));
  check(launch(reuse_kernel, Reuse{out.data(), stages, barrier}, 1, 64, 256, nullptr));
  return out;
}

// Threads in the order in which they run, each with how many barriers of its warp it has behind it.
struct Log {
  std::vector<std::pair<int, int>>* lines;
};

VISATTN_KERNEL(1024, 1)
log_kernel(const Log args) {
  for (int i = 0; i < 3; ++i) {
    args.lines->emplace_back(i, thread());
    sync_warp();
  }
}

VISATTN_KERNEL(32, 1)
blocks_kernel(const Log args) {
  if (thread() == 0) args.lines->emplace_back(0, int(block()));
}

struct Nothing {};
void empty_kernel(const Nothing) {}

std::vector<std::pair<int, int>> logged(void (*kernel)(Log), int64_t blocks, int threads) {
  std::vector<std::pair<int, int>> lines;
  check(launch(kernel, Log{&lines}, blocks, threads, 0, nullptr));
  return lines;
}

}  // namespace
}  // namespace visattn::cuda

PYBIND11_MODULE(emulated, m) {
  using namespace visattn::cuda;
  namespace emulator = visattn::emulator;

  m.def("run", &run, py::arg("name"), py::arg("rows"), py::arg("threads") = 32, py::arg("memory") = py::bytes());
  m.def("ops", [] {
    std::vector<std::string> names;
    for (const auto& op : kOps) names.push_back(op.first);
    return names;
  });

  py::enum_<Do>(m, "Do", py::module_local())
      .value("COPY", Do::kCopy)
      .value("ZERO", Do::kZero)
      .value("COMMIT", Do::kCommit)
      .value("WAIT", Do::kWait)
      .value("LOOK", Do::kLook);
  m.def("copies", &copies);
  m.def("fault", &fault);
  m.def("reuse", &reuse);

  m.def("order", [](int threads) { return logged(log_kernel, 1, threads); });
  m.def("blocks", [](int64_t blocks) { return logged(blocks_kernel, blocks, 32); });
  m.def("fold", [](int64_t blocks) {
    const GridSize grid = fold(blocks);
    return std::make_pair(grid.x, grid.y);
  });
  // The error's text, or None.
  m.def("launch", [](int64_t blocks, int threads, size_t shared) {
    return launch(empty_kernel, Nothing{}, blocks, threads, shared, nullptr);
  });

  m.def("schedules", [] {
    std::vector<std::string> names;
    for (const auto& schedule : emulator::kSchedules) names.push_back(schedule.name);
    return names;
  });
  m.def("schedule", [] { return emulator::settings().schedule; });
  m.def("set_schedule", [](int schedule) {
    if (schedule < 0 || schedule >= emulator::kScheduleCount) throw std::invalid_argument("no such schedule");
    emulator::settings().schedule = schedule;
  });
  m.def("set_seed", [](uint32_t seed) { emulator::settings().seed = seed; });
  m.def("set_max_grid_x", [](int64_t most) { emulator::settings().max_grid_x = most; });
}
