// 16-bit numbers of the emulated cuda_fp16.h and cuda_bf16.h, converted by the naive code of the self-tests.
#pragma once

#include <cstdint>

#include "../check.h"

namespace emulation {

template <transfuse::DType kType>
struct Half {
  uint16_t bits;
};

template <transfuse::DType kType>
inline float to_float(Half<kType> x) {
  return (float)selftest::load_as(kType, &x.bits, 0);
}
template <transfuse::DType kType>
inline Half<kType> from_float(float x) {
  Half<kType> half;
  selftest::store_as(kType, &half.bits, 0, (double)x);
  return half;
}

}  // namespace emulation
