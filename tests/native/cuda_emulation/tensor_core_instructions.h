// The instructions of csrc/cuda/tensor_core.h, of the same names, for the emulated build: layouts of the PTX ISA, and
// copies that come as late as they may.
#pragma once

#include <cstdint>

#include "storage.h"

namespace emulation {

// A copy is done when its thread waits for it; from when it is begun until then its target holds NaNs. So a missing
// wait, a missing barrier and a target that others still read all show.
void begin_copy(void* to, const void* from, bool there);
void end_group();
void wait_for_groups(int most);
// Copies begun since the start, and of these those that nobody has waited for.
long copies_begun();
long copies_pending();

void load_four_matrices(uint32_t (&r)[4], const void* row);
// Matrices loaded since the start of which two rows share banks: right, and slow.
long bank_conflicts();

// The accumulator is aligned with 8 products at a time and cut off at the last bit of the largest, then the sum again:
// as coarse as what Fasi et al. (2021) found in tensor cores. Whoever rounds less is nearer to the truth.
void multiply_16_8_16(transfuse::DType dtype, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <class M>
struct StorageOf;
template <transfuse::DType kType>
struct StorageOf<Half<kType>> {
  static constexpr transfuse::DType kDType = kType;
};

}  // namespace emulation

namespace transfuse {

inline void copy_16_async(void* shared, const void* global, bool there) {
  emulation::begin_copy(shared, global, there);
}
inline void commit_copies() { emulation::end_group(); }
template <int kMost>
inline void wait_for_copies() {
  emulation::wait_for_groups(kMost);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { emulation::load_four_matrices(r, row); }
template <class M>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_16_8_16(emulation::StorageOf<M>::kDType, d, a, b);
}

}  // namespace transfuse
