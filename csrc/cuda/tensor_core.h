// Instructions of compute capability 8.0 that CUDA C++ has no names for: a warp's matrix product of 16-bit numbers, the
// load of its operands from shared memory, and copies from global to shared memory that go on while the thread does.
// One function each, and nothing of what is done with them; PTX ISA 7.0, sections "mma", "ldmatrix" and "cp.async".
//
// The emulated build finds functions of the same names in tests/native/cuda_emulation/tensor_core_instructions.h.
#pragma once

#include <type_traits>

#include "device.h"

#if !defined(__CUDACC__)
#include "tensor_core_instructions.h"
#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "tensor_core.h needs compute capability 8.0 or newer"
#endif

namespace transfuse {

// Copies 16 bytes, or writes 16 zeros if nothing is `there`; both addresses are multiples of 16. The bytes may be read
// by this thread after wait_for_copies, by others after a barrier that follows it.
__device__ inline void copy_16_async(void* shared, const void* global, bool there) {
  const uint32_t to = (uint32_t)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
}

// Ends a group: the copies that this thread began since the last one, possibly none.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups, but for the kMost latest.
template <int kMost>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kMost) : "memory");
}

// Four 8x8 matrices of 16-bit numbers. Lane 8 m + r says where row r of matrix m lies: 16 bytes, at a multiple of 16.
// Register m is numbers 2 (lane % 4) and the next of row lane / 4 of matrix m, the first in the lower half.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// d += A B: A is 16x16, B 16x8, and a lane holds, with g = lane / 4 and t = lane % 4, the lower half of a register
// first:
//   a: A[g][2t..], A[g + 8][2t..], A[g][2t + 8..], A[g + 8][2t + 8..]    (two numbers side by side each)
//   b: B[2t..][g], B[2t + 8..][g]                                        (two numbers below each other each)
//   d: D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]
// Products are exact and sums are kept in float32; PTX leaves their order and their rounding open.
template <class M>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<M, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<M, __nv_bfloat16>, "numbers of 16 bits");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace transfuse

#endif
