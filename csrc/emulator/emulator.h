// Runs CUDA kernels on the CPU: blocks one after the other, the threads of a block as fibers that switch at
// collectives.
//
// A collective (a barrier, a shuffle, ldmatrix, mma) waits until all of its threads have arrived at the same call, and
// says who has not if one exits or arrives elsewhere: `launch` then throws. Between collectives a thread runs alone, so
// that what it does without synchronisation meets the others in an order that the schedule chooses: settings(), or
// VISATTN_SCHEDULE (a number or a name) and VISATTN_SEED in the environment. It shows indexing, masks, barriers and
// what is read before it is there; nothing of speed, bank conflicts, memory ordering or the tensor cores' rounding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "fiber.h"

namespace visattn::emulator {

enum class Order { kForward, kReverse, kRandom };

// Round-robin schedules let every warp in turn run to its next collective. A greedy one runs one warp until all of it
// waits for other warps: it finds what is overwritten while another warp still has to read it.
struct Schedule {
  const char* name;
  Order order;
  bool greedy;
};

constexpr Schedule kSchedules[] = {
    {"forward", Order::kForward, false},
    {"reverse", Order::kReverse, false},
    {"random", Order::kRandom, false},
    {"warp-greedy forward", Order::kForward, true},
    {"warp-greedy reverse", Order::kReverse, true},
    {"warp-greedy random", Order::kRandom, true},
};
constexpr int kScheduleCount = int(sizeof kSchedules / sizeof *kSchedules);

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 * 1024;

// Of the whole process. They may change between launches.
struct Settings {
  int schedule = 0;
  uint32_t seed = 1;               // of the random orders
  int64_t max_grid_x = kMaxGridX;  // small, it makes the grid fold, and some blocks lie beyond the number asked for

  Settings() {
    if (const char* const text = std::getenv("VISATTN_SEED")) seed = uint32_t(std::strtoul(text, nullptr, 10));
    const char* const text = std::getenv("VISATTN_SCHEDULE");
    if (!text) return;
    for (int i = 0; i < kScheduleCount; ++i)
      if (std::to_string(i) == text || !std::strcmp(kSchedules[i].name, text)) {
        schedule = i;
        return;
      }
    throw std::invalid_argument(std::string("VISATTN_SCHEDULE is ") + text);
  }
};

inline Settings& settings() {
  static Settings all;
  return all;
}

// A call of a primitive in a kernel's source.
struct Site {
  const char* primitive;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && same(primitive, other.primitive) && same(file, other.file);
  }

  std::string text() const {
    const char* const slash = std::strrchr(file, '/');
    return std::string(primitive) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
  }

 private:
  static bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
};

// A cp.async that has been issued and has not landed.
struct Copy {
  char* to;
  const char* from;
  bool present;
  int64_t group;
};
constexpr size_t kCopyBytes = 16;

struct Thread {
  int index;
  Fiber fiber;
  std::vector<Copy> copies;  // by rising group
  int64_t groups = 0;        // that have been committed

  Thread(int index_, void (*entry)()) : index(index_), fiber(entry, index_) {}
};

struct Warp {
  uint32_t ready = 0;    // lanes that can run
  uint32_t waiting = 0;  // lanes that wait at `at`
  uint32_t gone = 0;     // lanes that have exited or never were
  Site at = {};
  void* operands[kLanes] = {};
};

// The dynamic shared memory of a block, exact in size: what lies around it is AddressSanitizer's, or else is watched.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&memory_, kAlignment, kGuard + bytes + kGuard)) throw std::bad_alloc();
    std::memset(memory_, kPoison, kGuard + bytes + kGuard);
  }
  ~SharedMemory() { std::free(memory_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* begin() const { return static_cast<char*>(memory_) + kGuard; }
  bool holds(const void* at, size_t bytes) const {
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin()), p = reinterpret_cast<uintptr_t>(at);
    return first <= p && p - first <= bytes_ && bytes <= bytes_ - (p - first);
  }
  void fill() { std::memset(begin(), kPoison, bytes_); }
  bool overrun() const { return written(begin() - kGuard) || written(begin() + bytes_); }

  static constexpr int kPoison = 0xff;  // every float of it is NaN

 private:
#if defined(VISATTN_ASAN)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 1024;
#endif
  static constexpr size_t kAlignment = 128;

  static bool written(const char* guard) {
    return std::any_of(guard, guard + kGuard, [](char c) { return c != char(kPoison); });
  }

  void* memory_ = nullptr;
  size_t bytes_;
};

// The block that runs. A launch at a time has it, and its fibers live on from block to block and launch to launch.
struct Machine {
  std::mutex mutex;
  std::vector<std::unique_ptr<Thread>> pool;
  Fiber launcher;

  void (*run)(const void* launch) = nullptr;
  const void* launch = nullptr;
  SharedMemory* shared = nullptr;
  int64_t block = 0;

  Schedule schedule = kSchedules[0];
  uint32_t random = 1;
  Thread* current = nullptr;
  int warp = 0;       // whose turn it is
  uint32_t turn = 0;  // its lanes that have not run in this turn
  std::vector<Warp> warps;

  int threads = 0, exited = 0;
  int arrived = 0;  // at the barrier of the block
  Site barrier = {};
  bool predicate = false, result = false;
  std::string fault;
};

inline Machine machine;

inline std::string name(int thread) {
  return "warp " + std::to_string(thread / kLanes) + " lane " + std::to_string(thread % kLanes);
}

inline uint32_t draw() {
  uint32_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 17;
  return x ^= x << 5;
}

// One of the bits set, going from bit `from` in the schedule's direction.
inline int choose(uint32_t bits, int from) {
  if (machine.schedule.order == Order::kReverse) {
    const uint32_t below = bits & (0xffffffffu >> (31 - from));
    return 31 - __builtin_clz(below ? below : bits);
  }
  if (machine.schedule.order == Order::kRandom) from = int(draw() & 31);
  const uint32_t above = bits >> from << from;
  return __builtin_ctz(above ? above : bits);
}

// The thread to run next; null if none can.
inline Thread* next_thread() {
  Machine& m = machine;
  const bool forward = m.schedule.order != Order::kReverse;
  if (!(m.warps[m.warp].ready & m.turn) || (m.schedule.order == Order::kRandom && !m.schedule.greedy)) {
    m.turn = 0xffffffff;
    if (!m.schedule.greedy || !m.warps[m.warp].ready) {
      uint32_t able = 0;
      for (size_t i = 0; i < m.warps.size(); ++i) able |= uint32_t(m.warps[i].ready != 0) << i;
      if (!able) return nullptr;
      m.warp = choose(able, (m.warp + (forward ? 1 : 31)) & 31);
    }
  }
  Warp& warp = m.warps[m.warp];
  const int lane = choose(warp.ready & m.turn, forward ? 0 : 31);
  warp.ready &= ~(1u << lane);
  m.turn &= ~(1u << lane);
  return m.pool[m.warp * kLanes + lane].get();
}

// Back to `launch`, which throws what `fault` says.
[[noreturn]] inline void give_up() {
  machine.current->fiber.switch_to(machine.launcher);
  std::abort();
}

// Lets others run until this thread is ready again.
inline void suspend() {
  Thread& mine = *machine.current;
  Thread* const next = next_thread();
  if (!next) {
    machine.fault = "deadlock: every thread waits";
    give_up();
  }
  machine.current = next;
  mine.fiber.switch_to(next->fiber);
}

[[noreturn]] inline void fail(const Site& site, const char* what) {
  machine.fault = site.text() + " of " + name(machine.current->index) + ": " + what;
  give_up();
}

[[noreturn]] inline void diverge(const std::string& waits, const Site& at, int thread, const char* how,
                                 const Site* where) {
  machine.fault =
      "divergence: " + waits + " waits at " + at.text() + ", " + name(thread) + how + (where ? where->text() : "");
  give_up();
}

// The running thread at a collective; its lane's bit.
inline uint32_t arrive(Warp& warp, const Site& site) {
  const int thread = machine.current->index;
  if (warp.waiting && !(warp.at == site))
    diverge("warp " + std::to_string(thread / kLanes), warp.at, thread, " at ", &site);
  const uint32_t lane = 1u << thread % kLanes;
  warp.at = site;
  warp.waiting |= lane;
  return lane;
}

// Runs `run` on the operands of a whole warp once all of its lanes are here.
template <class Operands>
inline void collective(const Site& site, Operands& mine, void (*run)(Lanes<Operands>)) {
  const int thread = machine.current->index;
  Warp& warp = machine.warps[thread / kLanes];
  if (warp.gone) {
    const int other = thread / kLanes * kLanes + __builtin_ctz(warp.gone);
    diverge(name(thread), site, other, other < machine.threads ? " has exited" : " is not in the block", nullptr);
  }
  const uint32_t lane = arrive(warp, site);
  warp.operands[thread % kLanes] = &mine;
  if (warp.waiting != 0xffffffff) return suspend();
  run(Lanes<Operands>(warp.operands));
  warp.ready = ~lane;
  warp.waiting = 0;
}

inline void sync_warp(const Site& site) {
  Vote none{};
  collective(site, none, +[](Lanes<Vote>) {});
}

// The barrier of the block, and whether the predicate holds for any thread.
inline bool sync_block(const Site& site, bool predicate) {
  Machine& m = machine;
  const int thread = m.current->index;
  if (m.arrived && !(m.barrier == site)) diverge("the block", m.barrier, thread, " at ", &site);
  if (m.exited) {
    for (int other = 0; other < m.threads; ++other)
      if (m.warps[other / kLanes].gone >> other % kLanes & 1)
        diverge(name(thread), site, other, " has exited", nullptr);
  }
  Warp& mine = m.warps[thread / kLanes];
  const uint32_t lane = arrive(mine, site);
  m.barrier = site;
  m.predicate |= predicate;
  if (++m.arrived < m.threads) {
    suspend();
    return m.result;
  }
  m.result = m.predicate;
  m.predicate = false;
  m.arrived = 0;
  for (Warp& warp : m.warps) {
    warp.ready = warp.waiting;
    warp.waiting = 0;
  }
  mine.ready &= ~lane;
  return m.result;
}

inline void load_matrix(const Site& site, uint32_t (&registers)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(site, "the row is not aligned to 16 bytes");
  if (!machine.shared->holds(row, 16)) fail(site, "the row lies outside of shared memory");
  LoadMatrix mine{registers, static_cast<const char*>(row)};
  collective(site, mine, transposed ? &LoadMatrix::run<true> : &LoadMatrix::run<false>);
}

inline uint32_t shuffle(const Site& site, uint32_t value, int from) {
  Shuffle mine{value, 0, from};
  collective(site, mine, &Shuffle::run);
  return mine.result;
}

inline bool vote_any(const Site& site, bool predicate) {
  Vote mine{predicate, false};
  collective(site, mine, &Vote::run);
  return mine.any;
}

// The bytes are moved when they are waited for, as late as the hardware may; until then the destination is poison.
inline void copy_async(const Site& site, void* to, const void* from, bool present) {
  if (reinterpret_cast<uintptr_t>(to) % kCopyBytes) fail(site, "the destination is not aligned to 16 bytes");
  if (reinterpret_cast<uintptr_t>(from) % kCopyBytes) fail(site, "the source is not aligned to 16 bytes");
  if (!machine.shared->holds(to, kCopyBytes)) fail(site, "the destination lies outside of shared memory");
  std::memset(to, SharedMemory::kPoison, kCopyBytes);
  Thread& mine = *machine.current;
  mine.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), present, mine.groups});
}

inline void copy_commit() { ++machine.current->groups; }

// Lands all committed groups but the last `pending` ones.
inline void copy_wait(int pending) {
  Thread& mine = *machine.current;
  auto copy = mine.copies.begin();
  for (; copy != mine.copies.end() && copy->group < mine.groups - pending; ++copy) {
    if (copy->present)
      std::memcpy(copy->to, copy->from, kCopyBytes);
    else
      std::memset(copy->to, 0, kCopyBytes);
  }
  mine.copies.erase(mine.copies.begin(), copy);
}

// A fiber's life: one thread of a block after the other.
inline void live() {
  machine.current->fiber.arrive();
  for (;;) {
    Machine& m = machine;
    m.run(m.launch);
    Thread& mine = *m.current;
    Warp& warp = m.warps[mine.index / kLanes];
    if (warp.waiting)
      diverge("warp " + std::to_string(mine.index / kLanes), warp.at, mine.index, " has exited", nullptr);
    if (m.arrived) diverge("the block", m.barrier, mine.index, " has exited", nullptr);
    warp.gone |= 1u << mine.index % kLanes;
    mine.copies.clear();  // what nobody waited for never lands
    mine.groups = 0;
    if (++m.exited == m.threads) {
      mine.fiber.switch_to(m.launcher);
    } else {
      suspend();
    }
  }
}

inline void run_block() {
  Machine& m = machine;
  m.warps.assign(size_t(m.threads + kLanes - 1) / kLanes, Warp());
  for (Warp& warp : m.warps) warp.ready = 0xffffffff;
  if (m.threads % kLanes) {
    m.warps.back().ready = (1u << m.threads % kLanes) - 1;
    m.warps.back().gone = ~m.warps.back().ready;
  }
  m.exited = m.arrived = 0;
  m.predicate = false;
  const int warps = int(m.warps.size());
  m.warp = 0;
  if (m.schedule.order == Order::kReverse) m.warp = warps - 1;
  if (m.schedule.order == Order::kRandom) m.warp = int(draw() % uint32_t(warps));
  m.turn = 0xffffffff;
  m.shared->fill();
  m.current = next_thread();
  m.launcher.switch_to(m.current->fiber);
  m.current = nullptr;
  if (m.fault.empty() && m.shared->overrun()) m.fault = "a thread wrote beyond the shared memory";
  if (m.fault.empty()) return;
  const std::string fault = "the emulator: " + m.fault + ", in block " + std::to_string(m.block);
  m.fault.clear();
  m.pool.clear();  // with the threads that stopped halfway
  throw std::runtime_error(fault);
}

// Runs the blocks of a grid. Null, or the error's text as CUDA has it for what a device would refuse.
template <class Args>
const char* launch(void (*kernel)(Args), const Args& args, int64_t grid_x, int64_t grid_y, int threads,
                   size_t shared_bytes) {
  const auto within = [](int64_t n, int64_t most) { return 0 < n && n <= most; };
  if (!within(grid_x, kMaxGridX) || !within(grid_y, kMaxGridY) || !within(threads, kMaxThreads))
    return "invalid configuration argument";
  if (shared_bytes > kMaxShared) return "invalid argument";
  struct Launch {
    void (*kernel)(Args);
    const Args& args;
  } const launch{kernel, args};
  Machine& m = machine;
  const std::lock_guard<std::mutex> lock(m.mutex);
  SharedMemory shared(shared_bytes);
  m.run = [](const void* p) { static_cast<const Launch*>(p)->kernel(static_cast<const Launch*>(p)->args); };
  m.launch = &launch;
  m.shared = &shared;
  m.schedule = kSchedules[settings().schedule];
  m.random = settings().seed * 2654435769u | 1u;
  m.threads = threads;
  while (int(m.pool.size()) < threads) m.pool.push_back(std::make_unique<Thread>(int(m.pool.size()), &live));
  for (m.block = 0; m.block < grid_x * grid_y; ++m.block) run_block();
  return nullptr;
}

}  // namespace visattn::emulator
