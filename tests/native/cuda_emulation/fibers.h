// The threads of one CUDA block as fibers of one operating system thread: what the emulated cuda_runtime.h runs on.
//
// Blocks come one after the other, and a thread runs until it waits for others, so every run is the same. In which
// order blocks and threads come can be chosen: results that depend on it have a data race, or lack a barrier. Threads
// that wait for others that never come (a barrier in a branch) end the process with a message.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

enum class Order { forward, backward, shuffled };

// Order of blocks and threads in the launches that follow.
void set_order(Order order);

Order order();

// Runs body(context) in every thread of every block, with that many bytes of dynamic shared memory.
void run_grid(unsigned blocks, unsigned threads, size_t shared, void (*body)(void*), void* context);

// The block's dynamic shared memory, NaN at its start: 16 bytes after a place that is aligned to 1024, as nobody
// promises more, and the offset of an address in it from that place.
unsigned char* dynamic_shared();
uint32_t shared_address(const void* p);
unsigned char* at_shared_address(uint32_t address);

// Waits for all threads of the block, or of the warp.
void wait_for_block();
void wait_for_warp();

// Waits until ready(context).
void wait_until(bool (*ready)(const void*), const void* context);

// What goes on beside the threads of a block: begin and end of a block, and a step when all threads wait, which says
// whether it did something.
struct Machinery {
  void (*begin)();
  bool (*step)();
  void (*end)();
};
void set_machinery(const Machinery& machinery);

// Where a warp's threads leave numbers for each other: 32 slots of 8 bytes, another set after every exchange.
uint64_t* exchange_slots();

[[noreturn]] void fail(const char* message);

}  // namespace emulation
