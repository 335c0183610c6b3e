#include "fibers.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
// Saves the registers that a call must keep and the stack pointer, and goes on from another stack. (swapcontext does
// the same with two system calls, which is most of the time these tests would take.)
extern "C" void transfuse_switch_stack(void** save, void* load);
asm(R"(
.text
.globl transfuse_switch_stack
.type transfuse_switch_stack, @function
transfuse_switch_stack:
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
.size transfuse_switch_stack, .-transfuse_switch_stack
)");
#endif

namespace emulation {
namespace {

constexpr size_t kStack = 256 << 10;  // bytes per thread; pages that are not touched cost nothing
constexpr unsigned kWarpSize = 32;

struct Barrier {
  unsigned members = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Fiber {
  unsigned index = 0;
  bool done = false;
  const Barrier* waits = nullptr;  // until it has left this generation
  uint64_t generation = 0;
  bool (*ready)(const void*) = nullptr;  // or until this holds
  const void* wanted = nullptr;

  bool waiting() const {
    return (waits != nullptr && waits->generation == generation) || (ready != nullptr && !ready(wanted));
  }
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kWarpSize];
};

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};

constexpr size_t kSharedOffset = 16, kSharedAlignment = 1024;
void* aligned(size_t bytes) {
  void* p = nullptr;
  return posix_memalign(&p, kSharedAlignment, bytes) == 0 ? p : nullptr;
}

std::vector<Fiber> fibers;
std::vector<std::unique_ptr<char, FreeMemory>> stacks;
std::vector<Warp> warps;
std::unique_ptr<unsigned char, FreeMemory> shared_memory;
size_t shared_bytes = 0;
Barrier block;
Order wanted_order = Order::forward;
Machinery machinery{[] {}, [] { return false; }, [] {}};
Fiber* current = nullptr;
void (*body)(void*) = nullptr;
void* argument = nullptr;

#if defined(__x86_64__)
void* scheduler_pointer = nullptr;
#else
ucontext_t scheduler_context;
#endif

// AddressSanitizer has to know which stack is in use.
void announce([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}
void arrive([[maybe_unused]] void* save, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(save, bottom, size);
#endif
}
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void* scheduler_fake = nullptr;

void to_scheduler() {
  Fiber* own = current;
  announce(own->done ? nullptr : &own->fake_stack, scheduler_bottom, scheduler_size);
#if defined(__x86_64__)
  transfuse_switch_stack(&own->stack_pointer, scheduler_pointer);
#else
  swapcontext(&own->context, &scheduler_context);
#endif
  arrive(own->fake_stack, &scheduler_bottom, &scheduler_size);
}

void to_fiber(Fiber* fiber) {
  current = fiber;
  threadIdx = dim3(fiber->index);
  announce(&scheduler_fake, stacks[fiber->index].get(), kStack);
#if defined(__x86_64__)
  transfuse_switch_stack(&scheduler_pointer, fiber->stack_pointer);
#else
  swapcontext(&scheduler_context, &fiber->context);
#endif
  arrive(scheduler_fake, nullptr, nullptr);
}

void start() {
  arrive(nullptr, &scheduler_bottom, &scheduler_size);
  body(argument);
  current->done = true;
  to_scheduler();
  fail("a thread went on after its end");
}

void prepare(Fiber* fiber, unsigned index) {
  *fiber = Fiber();
  fiber->index = index;
  char* const stack = stacks[index].get();
#if defined(__x86_64__)
  // As transfuse_switch_stack leaves it: six registers, and the address to return to. A function begins with a stack
  // pointer that is 8 past a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + kStack - 24);
  top[-1] = reinterpret_cast<void*>(&start);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  fiber->stack_pointer = top - 7;
  top[0] = nullptr;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, start, 0);
#endif
}

void wait(Barrier* barrier) {
  const uint64_t now = barrier->generation;
  if (++barrier->arrived == barrier->members) {
    barrier->arrived = 0;
    ++barrier->generation;
    return;
  }
  current->waits = barrier;
  current->generation = now;
  to_scheduler();
  current->waits = nullptr;
}

// Place `i` of `count` in the order that is set; `round` varies a shuffled one.
unsigned place(unsigned i, unsigned count, unsigned round) {
  if (wanted_order == Order::backward) return count - 1 - i;
  if (wanted_order == Order::forward || count < 3) return i;
  // An odd multiplier without a common divisor is a permutation.
  unsigned step = 2 * (round % 5) + 7;
  const auto divides = [&](unsigned a, unsigned b) {
    while (b != 0) {
      const unsigned rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  };
  while (divides(step, count) != 1) ++step;
  return (unsigned)(((uint64_t)i * step + round) % count);
}

void run_block(unsigned threads) {
  block = Barrier();
  block.members = threads;
  for (unsigned w = 0; w < (unsigned)warps.size(); ++w) {
    warps[w] = Warp();
    const unsigned left = threads - w * kWarpSize;
    warps[w].barrier.members = left < kWarpSize ? left : kWarpSize;
  }
  for (unsigned t = 0; t < threads; ++t) prepare(&fibers[t], t);
  unsigned alive = threads;
  // A warp goes on for as long as it can: what another has not read yet is overwritten if nothing prevents it.
  for (unsigned round = 0; alive > 0; ++round) {
    bool moved = false;
    for (unsigned w = 0; w < (unsigned)warps.size(); ++w) {
      const unsigned warp = place(w, (unsigned)warps.size(), round), first = warp * kWarpSize;
      const unsigned count = threads - first < kWarpSize ? threads - first : kWarpSize;
      for (bool again = true; again;) {
        again = false;
        for (unsigned i = 0; i < count; ++i) {
          Fiber* fiber = &fibers[first + place(i, count, round)];
          if (fiber->done || fiber->waiting()) continue;
          to_fiber(fiber);
          alive -= fiber->done;
          moved = again = true;
        }
      }
    }
    if (!moved && !machinery.step())
      fail("threads of a block wait for others that do not come: a barrier is not reached by all");
  }
}

}  // namespace

void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulation: %s\n", message);
  std::abort();
}

void set_order(Order wanted) { wanted_order = wanted; }
Order order() { return wanted_order; }
void set_machinery(const Machinery& wanted) { machinery = wanted; }

unsigned char* dynamic_shared() { return shared_memory.get() + kSharedOffset; }
uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const unsigned char*>(p) - shared_memory.get();
  if (offset < 0 || (size_t)offset > kSharedOffset + shared_bytes) fail("an address outside dynamic shared memory");
  return (uint32_t)offset;
}
unsigned char* at_shared_address(uint32_t address) { return shared_memory.get() + address; }

void run_grid(unsigned blocks, unsigned threads, size_t shared, void (*run)(void*), void* context) {
  body = run;
  argument = context;
  blockDim = dim3(threads);
  gridDim = dim3(blocks);
  fibers.resize(threads);
  warps.resize((threads + kWarpSize - 1) / kWarpSize);
  while (stacks.size() < threads) stacks.emplace_back(static_cast<char*>(std::malloc(kStack)));
  // Ends with its last byte, so that AddressSanitizer sees what goes beyond.
  shared_bytes = shared;
  shared_memory.reset(static_cast<unsigned char*>(aligned(kSharedOffset + shared)));
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = dim3(place(b, blocks, 1));
    std::memset(shared_memory.get(), 0xff, kSharedOffset + shared);
    machinery.begin();
    run_block(threads);
    machinery.end();
  }
}

void wait_until(bool (*ready)(const void*), const void* context) {
  if (ready(context)) return;
  current->ready = ready;
  current->wanted = context;
  to_scheduler();
  current->ready = nullptr;
}

void wait_for_block() { wait(&block); }
void wait_for_warp() { wait(&warps[current->index / kWarpSize].barrier); }

uint64_t* exchange_slots() {
  Warp& warp = warps[current->index / kWarpSize];
  return warp.slots[warp.barrier.generation % 2];
}

}  // namespace emulation
