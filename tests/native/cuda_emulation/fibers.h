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

// Runs body(context) in every thread of every block.
void run_grid(unsigned blocks, unsigned threads, void (*body)(void*), void* context);

// Waits for all threads of the block, or of the warp.
void wait_for_block();
void wait_for_warp();

// Where a warp's threads leave numbers for each other: 32 slots of 8 bytes, another set after every exchange.
uint64_t* exchange_slots();

[[noreturn]] void fail(const char* message);

}  // namespace emulation
