// Instructions of compute capability 9.0 that CUDA C++ has no names for: barriers in shared memory, copies of tensor
// tiles (TMA), warpgroup matrix products and the balance of registers between warpgroups. One function each, and
// nothing of what is done with them; PTX ISA 8.0, sections "mbarrier", "cp.async.bulk.tensor" and "wgmma".
//
// The emulated build finds functions of the same names in tests/native/cuda_emulation/hopper_instructions.h.
#pragma once

#include <cuda.h>

#include "device.h"

namespace transfuse {

constexpr int kWarpgroup = 4 * kWarp;
// A matrix in shared memory is made of panels: rows of 128 bytes, whose 16-byte pieces are exchanged by the row's
// number modulo 8 (the 128-byte swizzle). Copies of tiles write it so, and matrix products read it so.
constexpr int kPanelBytes = 128;
constexpr int kSwizzleRows = 8;
constexpr int kSwizzleBytes = kSwizzleRows * kPanelBytes;  // also what a panel has to be aligned to

// Where a matrix product finds an operand (PTX ISA, "matrix descriptor"): its address in shared memory, how far panels
// lie apart (used only where rows hold columns, not the depth), and how far groups of 8 rows.
__host__ __device__ inline uint64_t panel_descriptor(uint32_t address, uint32_t panel_distance) {
  const uint64_t start = (address & 0x3ffff) >> 4, panels = (panel_distance & 0x3ffff) >> 4;
  return start | panels << 16 | (uint64_t)(kSwizzleBytes >> 4) << 32 | (uint64_t)1 << 62;
}

// d (+)= A B^T with A and B in shared memory, rows holding the depth: 64 rows, kColumns columns, 16 deep.
template <class T, int kColumns>
struct ProductOfShared;
// d += A B with A in registers, pairs of it packed as the result of another product lies, and B in shared memory, a row
// for each of the 16 of the depth.
template <class T, int kColumns>
struct ProductOfRegisters;

}  // namespace transfuse

#if !defined(__CUDACC__)
#include "hopper_instructions.h"
#else

namespace transfuse {

// ---- shared memory -------------------------------------------------------------------------------------------------

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ unsigned char transfuse_dynamic_shared[];
  return transfuse_dynamic_shared;
}
__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Orders what threads have done with shared memory before what copies of tiles and matrix products do with it.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- barriers ------------------------------------------------------------------------------------------------------

struct alignas(8) Barrier {
  uint64_t state;
};

__device__ inline void barrier_init(Barrier* b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to copies of tiles. The threads of the block still have to meet after it.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and makes the phase wait for that many bytes of copies as well.
__device__ inline void barrier_expect(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is over; before the first there was one of parity 1.
__device__ inline void barrier_wait(Barrier* b, uint32_t parity) {
  const uint32_t address = shared_address(b);
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}\n"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
  } while (over == 0);
}

// Barriers of the block by number (1 to 15), for `threads` of it: those that wait, and those that only say they came.
__device__ inline void named_barrier_wait(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- copies of tiles -----------------------------------------------------------------------------------------------

// One thread starts the copy of the map's box at these coordinates, whose bytes count for the barrier. Elements outside
// the tensor are zero, and their bytes count too.
__device__ inline void copy_tile(void* to, const CUtensorMap* map, Barrier* b, int channel, int token, int head,
                                 int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(b)), "r"(channel), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// ---- registers -----------------------------------------------------------------------------------------------------

template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two numbers rounded and packed, the first in the lower half.
__device__ inline uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ inline uint32_t pack_pair(float low, float high, __half) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// ---- matrix products of a warpgroup --------------------------------------------------------------------------------

// Orders earlier uses of registers before the products that follow.
__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the products started so far.
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups are under way.
template <int kPending>
__device__ inline void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of these registers across this place: a product may be using them.
template <int kCount>
__device__ inline void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
__device__ inline void pin(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// x, which the compiler takes for new: what depends on it is computed here, not kept in registers from before a loop.
__device__ inline int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The four (or more) registers of a result, as operands of an asm statement; and their names in it.
#define TRANSFUSE_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TRANSFUSE_F16(i) TRANSFUSE_F4(i), TRANSFUSE_F4(i + 4), TRANSFUSE_F4(i + 8), TRANSFUSE_F4(i + 12)
#define TRANSFUSE_OUT40 TRANSFUSE_F16(0), TRANSFUSE_F4(16)
#define TRANSFUSE_OUT64 TRANSFUSE_F16(0), TRANSFUSE_F16(16)
#define TRANSFUSE_OUT80 TRANSFUSE_F16(0), TRANSFUSE_F16(16), TRANSFUSE_F4(32), TRANSFUSE_F4(36)
#define TRANSFUSE_OUT128 TRANSFUSE_F16(0), TRANSFUSE_F16(16), TRANSFUSE_F16(32), TRANSFUSE_F16(48)
#define TRANSFUSE_D40                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19"
#define TRANSFUSE_D64                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TRANSFUSE_D80                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define TRANSFUSE_D128                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// a, b, c, e, f: the numbers of the operands after the result's.
#define TRANSFUSE_PRODUCTS(Type, name, kColumns, a, b, c, e, f)                                                \
  template <>                                                                                                  \
  struct ProductOfShared<Type, kColumns> {                                                                     \
    __device__ static inline void start(float (&d)[kColumns / 2], uint64_t left, uint64_t right, int add) {    \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #c                                   \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." name "." name                \
                   " {" TRANSFUSE_D##kColumns "}, %" #a ", %" #b ", accumulate, 1, 1, 0, 0;\n}\n"              \
                   : TRANSFUSE_OUT##kColumns                                                                   \
                   : "l"(left), "l"(right), "r"(add));                                                         \
    }                                                                                                          \
  };                                                                                                           \
  template <>                                                                                                  \
  struct ProductOfRegisters<Type, kColumns> {                                                                  \
    __device__ static inline void start(float (&d)[kColumns / 2], const uint32_t (&left)[4], uint64_t right) { \
      asm volatile(                                                                                            \
          "{\n.reg .pred accumulate;\nsetp.eq.u32 accumulate, 0, 0;\n"                                         \
          "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." name "." name " {" TRANSFUSE_D##kColumns    \
          "}, {%" #a ", %" #b ", %" #c ", %" #e "}, %" #f ", accumulate, 1, 1, 1;\n}\n"                        \
          : TRANSFUSE_OUT##kColumns                                                                            \
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));                               \
    }                                                                                                          \
  };
#define TRANSFUSE_PRODUCTS_OF_BOTH(kColumns, a, b, c, e, f)          \
  TRANSFUSE_PRODUCTS(__nv_bfloat16, "bf16", kColumns, a, b, c, e, f) \
  TRANSFUSE_PRODUCTS(__half, "f16", kColumns, a, b, c, e, f)

TRANSFUSE_PRODUCTS_OF_BOTH(40, 20, 21, 22, 23, 24)
TRANSFUSE_PRODUCTS_OF_BOTH(64, 32, 33, 34, 35, 36)
TRANSFUSE_PRODUCTS_OF_BOTH(80, 40, 41, 42, 43, 44)
TRANSFUSE_PRODUCTS_OF_BOTH(128, 64, 65, 66, 67, 68)

#undef TRANSFUSE_PRODUCTS_OF_BOTH
#undef TRANSFUSE_PRODUCTS

}  // namespace transfuse

#endif
