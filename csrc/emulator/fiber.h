// Fibers: functions with a stack of their own that hand control to each other within one thread of the system.
//
// On x86-64 a switch is a few instructions; elsewhere, or with VISATTN_UCONTEXT, it is the C library's swapcontext.
// AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define VISATTN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define VISATTN_ASAN 1
#endif
#endif
#if defined(VISATTN_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(VISATTN_UCONTEXT)
#define VISATTN_UCONTEXT 1
#endif
#if defined(VISATTN_UCONTEXT)
#include <ucontext.h>
#else
// Saves the registers that a call keeps, leaves the stack pointer in *from, and goes on where `to` was left. Weak,
// since every source that includes this header defines it.
extern "C" void visattn_switch_stacks(void** from, void* to);
asm(R"(
.pushsection .text
.weak visattn_switch_stacks
.hidden visattn_switch_stacks
.type visattn_switch_stacks, @function
visattn_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size visattn_switch_stacks, . - visattn_switch_stacks
.popsection
)");
#endif

namespace visattn::emulator {

class Fiber {
 public:
  // The one that runs already, on the system's stack.
  Fiber() = default;

  // One that begins with `entry`, which calls `arrive` first and never returns, when it is first switched to. `colour`
  // shifts its frames, since stacks that all begin on a page would share a few sets of the cache.
  Fiber(void (*entry)(), int colour) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    mapped_ = kStack + page;
    void* const memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, page, PROT_NONE);  // running over the end is a fault, not somebody else's data
    bottom_ = memory_ + page;
    size_ = kStack;
    char* const top = memory_ + mapped_ - colour % 32 * 128;
#if defined(VISATTN_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory_ + page;
    context_.uc_stack.ss_size = size_t(top - (memory_ + page));
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    // As if `entry` had been called: six registers, where to return to, and nobody to return to from there.
    void** const frame = reinterpret_cast<void**>(top) - 8;
    std::memset(frame, 0, 8 * sizeof(void*));
    std::memcpy(&frame[6], &entry, sizeof entry);
    stopped_ = frame;
#endif
  }

  ~Fiber() {
    if (!memory_) return;
#if defined(VISATTN_ASAN)
    __asan_unpoison_memory_region(bottom_, size_);  // of frames that nobody has left; the pages may serve others next
#endif
    munmap(memory_, mapped_);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // To be called on this fiber; returns when another one switches back.
  void switch_to(Fiber& next) {
    last = this;
#if defined(VISATTN_ASAN)
    __sanitizer_start_switch_fiber(&fake_, next.bottom_, next.size_);
#endif
#if defined(VISATTN_UCONTEXT)
    swapcontext(&context_, &next.context_);
#else
    visattn_switch_stacks(&stopped_, next.stopped_);
#endif
    arrive();
  }

  void arrive() {
#if defined(VISATTN_ASAN)
    // This is how the bounds of the system's stack become known; those of the others stay what they are.
    __sanitizer_finish_switch_fiber(fake_, &last->bottom_, &last->size_);
#endif
  }

 private:
  static constexpr size_t kStack = 256 * 1024;
  static inline Fiber* last = nullptr;  // the one that the last switch left

  char* memory_ = nullptr;
  size_t mapped_ = 0;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(VISATTN_ASAN)
  void* fake_ = nullptr;
#endif
#if defined(VISATTN_UCONTEXT)
  ucontext_t context_;
#else
  void* stopped_ = nullptr;
#endif
};

}  // namespace visattn::emulator
