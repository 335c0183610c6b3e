// What the CUDA kernels share: numbers as they are stored and as they are computed with, 16-byte packs, launching.
// Plain calls of the CUDA runtime and nothing of torch, so that these files also compile as C++ against the emulation
// in tests/native/cuda_emulation, where they are tested without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "transfuse/types.h"

namespace transfuse {

constexpr int kPackBytes = 16;
constexpr int kWarp = 32;
// Blocks of a grid along x; kernels walk on from there. (Tests take few, so that they do.)
#if defined(TRANSFUSE_MAX_BLOCKS)
constexpr int64_t kMaxBlocks = TRANSFUSE_MAX_BLOCKS;
#else
constexpr int64_t kMaxBlocks = 0x7fffffff;
#endif

template <class M>
struct Arithmetic {
  using A = float;
};
template <>
struct Arithmetic<double> {
  using A = double;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* p) { *p = x; }
__device__ inline void narrow(double x, double* p) { *p = x; }
__device__ inline void narrow(float x, __half* p) { *p = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16* p) { *p = __float2bfloat16_rn(x); }

// `Size` numbers read or written at once; a whole pack is 16 bytes.
template <class M, int Size = kPackBytes / (int)sizeof(M)>
struct alignas(Size * sizeof(M)) Pack {
  static constexpr int kSize = Size;
  M v[Size];
};

template <class P, class M>
__device__ inline P load_pack(const M* p) {
  return *reinterpret_cast<const P*>(p);
}

// Whether `p` may be read in whole packs.
template <class M>
__host__ __device__ inline bool pack_aligned(const M* p) {
  return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0;
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...), as a call; `shared` is bytes of dynamic shared memory.
template <class... Parameters, class... Arguments>
inline cudaError_t launch_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                                 cudaStream_t stream, Arguments&&... arguments) {
  if (shared > 0) {
    const auto key = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), key, shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// The same without.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                          Arguments&&... arguments) {
  return launch_shared(kernel, blocks, threads, 0, stream, std::forward<Arguments>(arguments)...);
}

// Calls f with a number of the storage type.
template <class F>
inline cudaError_t with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::bf16: return f(__nv_bfloat16());
    case DType::f16: return f(__half());
  }
  return cudaErrorInvalidValue;
}

// The message of an error, or nullptr.
inline const char* message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace transfuse
