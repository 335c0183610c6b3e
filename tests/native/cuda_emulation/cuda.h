// As much of the CUDA driver's header as describes tensors for copies of tiles. A description is checked as the driver
// documents it and kept in plain numbers.
#pragma once

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(128) CUtensorMap {
  const unsigned char* base;
  uint64_t size[4], stride[4];  // channels first; strides in bytes
  uint32_t box[4];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* every, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const auto aligned = [](uint64_t x, uint64_t to) { return x % to == 0; };
  bool fits = rank == 4 && base != nullptr && aligned(reinterpret_cast<uint64_t>(base), 16) && box[0] * 2 <= 128;
  for (int d = 0; d < 4; ++d) {
    fits = fits && size[d] >= 1 && size[d] <= (uint64_t)1 << 32 && box[d] >= 1 && box[d] <= 256 && every[d] == 1;
    if (d > 0) fits = fits && aligned(strides[d - 1], 16) && strides[d - 1] < (uint64_t)1 << 40;
    map->size[d] = size[d];
    map->stride[d] = d == 0 ? 2 : strides[d - 1];
    map->box[d] = box[d];
  }
  map->base = static_cast<const unsigned char*>(base);
  fits = fits && strides[0] >= size[0] * 2;  // rows do not overlap
  return fits && aligned(box[0] * 2, 16) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
