// Descriptions of tensors for copies of tiles (cuTensorMapEncodeTiled), made on the host at every launch.
#pragma once

#include "hopper.h"

namespace transfuse {

// A (batch, head, token, channel) tensor as tiles of 64 channels x `rows` tokens are copied from it.
struct TileMap {
  CUtensorMap map;
  int head_step, batch_step;  // 0 where one serves for all
};

// The driver's function, asked for by name: the library is not linked with the driver. nullptr where it has none.
inline decltype(&cuTensorMapEncodeTiled) tile_encoder() {
#if defined(__CUDACC__)
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
#else
  return &cuTensorMapEncodeTiled;
#endif
}

// Fills `out`; nullptr, or why not.
inline const char* make_tile_map(const View& v, int64_t channels, int64_t tokens, int64_t heads, int64_t batches,
                                 int rows, TileMap* out) {
  static const auto encode = tile_encoder();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled (CUDA 12 or newer is needed)";
  const cuuint64_t item = (cuuint64_t)item_size(v.dtype);
  const int64_t size[3] = {tokens, heads, batches};
  // An axis of one entry, or with the same for all, has any stride that holds a row.
  const cuuint64_t row = (cuuint64_t)channels * item;
  cuuint64_t dims[4] = {(cuuint64_t)channels, 1, 1, 1}, strides[3] = {row, row, row};
  int step[3] = {0, 0, 0};
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t stride = v.stride[2 - axis];
    if (size[axis] < 2 || stride == 0) continue;
    dims[axis + 1] = (cuuint64_t)size[axis];
    strides[axis] = (cuuint64_t)stride * item;
    step[axis] = 1;
  }
  out->head_step = step[1];
  out->batch_step = step[2];
  const cuuint32_t box[4] = {(cuuint32_t)(kPanelBytes / item), (cuuint32_t)rows, 1, 1}, every[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      v.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(&out->map, type, 4, const_cast<void*>(v.ptr), dims, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "a tensor cannot be described for copies of tiles";
}

}  // namespace transfuse
