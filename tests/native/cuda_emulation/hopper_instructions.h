// The functions of csrc/cuda/hopper.h for the emulated build: what the instructions do, by the PTX ISA.
//
// What is asynchronous comes late: when no thread can go on without it, and then in an arbitrary order. So reading too
// early finds what was there before (NaN, in registers of a result), and overwriting too early spoils what is still to
// be read. With threads in another order than forward, copies of tiles come at once instead.
#pragma once

#include "fibers.h"
#include "storage.h"

namespace emulation {

// ---- barriers -------------------------------------------------------------------------------------------------------

struct Phases {  // of a barrier in shared memory; eight bytes, as there
  uint64_t parity : 1, left : 15, members : 15, initialised : 1, bytes : 32;  // left: arrivals; bytes: of copies
};
static_assert(sizeof(Phases) == 8, "as large as the barrier of the device");

void arrive(Phases* b, uint32_t bytes);
void complete(Phases* b, uint32_t bytes);
void wait_for_phase(Phases* b, uint32_t parity);
void arrive_named(int number, int threads, bool wait);

// ---- copies and products --------------------------------------------------------------------------------------------

void copy_tile(unsigned char* to, const CUtensorMap* map, Phases* b, const int (&corner)[4]);

struct Product {
  transfuse::DType type;
  int columns;
  float* result;              // of this thread: columns / 2
  uint64_t left, right;       // descriptors
  const uint32_t* registers;  // of this thread, instead of left
  bool add;
};
void fence_products();
void start_product(const Product& product);
void commit_products();
void wait_for_products(int pending);

}  // namespace emulation

namespace transfuse {

inline unsigned char* dynamic_shared() { return emulation::dynamic_shared(); }
inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }
inline void fence_async_proxy() {}

struct alignas(8) Barrier {
  emulation::Phases phases;
};
inline void barrier_init(Barrier* b, uint32_t arrivals) { b->phases = {0, arrivals, arrivals, 1, 0}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* b) { emulation::arrive(&b->phases, 0); }
inline void barrier_expect(Barrier* b, uint32_t bytes) { emulation::arrive(&b->phases, bytes); }
inline void barrier_wait(Barrier* b, uint32_t parity) { emulation::wait_for_phase(&b->phases, parity); }
inline void named_barrier_wait(int number, int threads) { emulation::arrive_named(number, threads, true); }
inline void named_barrier_arrive(int number, int threads) { emulation::arrive_named(number, threads, false); }

inline void copy_tile(void* to, const CUtensorMap* map, Barrier* b, int channel, int token, int head, int batch) {
  emulation::copy_tile(static_cast<unsigned char*>(to), map, &b->phases, {channel, token, head, batch});
}

template <int kCount>
inline void take_registers() {}
template <int kCount>
inline void give_registers() {}
inline int computed_here(int x) { return x; }
inline float exp2_fast(float x) { return std::exp2(x); }

template <DType kType>
inline uint32_t pack_pair(float low, float high, emulation::Half<kType>) {
  return emulation::from_float<kType>(low).bits | (uint32_t)emulation::from_float<kType>(high).bits << 16;
}

inline void product_fence() { emulation::fence_products(); }
inline void product_commit() { emulation::commit_products(); }
template <int kPending>
inline void product_wait() {
  emulation::wait_for_products(kPending);
}
template <class T, int kCount>
inline void pin(T (&)[kCount]) {}

template <DType kType, int kColumns>
struct ProductOfShared<emulation::Half<kType>, kColumns> {
  static void start(float (&d)[kColumns / 2], uint64_t left, uint64_t right, int add) {
    emulation::start_product({kType, kColumns, d, left, right, nullptr, add != 0});
  }
};
template <DType kType, int kColumns>
struct ProductOfRegisters<emulation::Half<kType>, kColumns> {
  static void start(float (&d)[kColumns / 2], const uint32_t (&left)[4], uint64_t right) {
    emulation::start_product({kType, kColumns, d, 0, right, left, true});
  }
};

}  // namespace transfuse
