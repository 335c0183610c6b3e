// As much of the CUDA runtime's header as the kernels of csrc/cuda use, for a C++ compiler: a launch runs the kernel on
// the CPU, on the calling thread (see fibers.h). Found instead of the toolkit's by the order of include folders.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((0 + ... + sizeof(Parameters)) <= 4096, "arguments of a kernel are at most 4 KiB on sm_80");
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
  if (block.x < 1 || block.x > 1024 || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  emulation::run_grid(
      grid.x, block.x, config->dynamicSmemBytes,
      [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->arguments); }, &call);
  return cudaSuccess;
}

// ---- inside a kernel --------------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::wait_for_block(); }

inline void transfuse_check_mask(unsigned mask) {
  if (mask != 0xffffffffu || blockDim.x % 32 != 0) emulation::fail("a shuffle that is not of a whole warp");
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  transfuse_check_mask(mask);
  emulation::wait_for_warp();
}
template <class T>
T transfuse_exchange(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  transfuse_check_mask(mask);
  uint64_t* slots = emulation::exchange_slots();
  std::memcpy(slots + threadIdx.x % 32, &value, sizeof value);
  emulation::wait_for_warp();
  std::memcpy(&value, slots + from % 32, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return transfuse_exchange(mask, value, threadIdx.x % 32 ^ (unsigned)lanes);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return transfuse_exchange(mask, value, (unsigned)lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  transfuse_check_mask(mask);
  uint64_t* slots = emulation::exchange_slots();
  slots[threadIdx.x % 32] = predicate != 0;
  emulation::wait_for_warp();
  unsigned found = 0;
  for (unsigned lane = 0; lane < 32; ++lane) found |= (unsigned)slots[lane] << lane;
  return found;
}
inline float __int_as_float(int x) {
  float f;
  std::memcpy(&f, &x, sizeof f);
  return f;
}
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x < y ? y : x; }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
