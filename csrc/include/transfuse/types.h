// Plain types shared by kernels and registration: no torch header is needed to compile a kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace transfuse {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

inline int64_t item_size(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// A strided view of up to four axes; strides count elements, 0 broadcasts. ptr == nullptr means "absent".
struct View {
  const void* ptr = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
  bool present() const { return ptr != nullptr; }
};
struct MutableView {
  void* ptr = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// A number per (batch, head, token), or one number for all.
struct Weight {
  View view;  // strides (batch, head, token)
  double value = 1.0;
};

}  // namespace transfuse
