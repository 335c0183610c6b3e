// Per-sample linear combinations of tensors, and inner products of them, in one reading (mix).
//
// Over inputs t_0 .. t_{K-1} of shape (batch, count), and t_K = 1 everywhere,
//   out_j[b]      = sum_k coefficient[b, j, k] t_k[b]              k = 0..K
//   product_p[b]  = sum over elements of t_{p.first}[b] t_{p.second}[b]
// Guidance, sampler steps, forward noising and interpolation are the first; cosines and deviations of predictions come
// from the second. Gradients of either are again both, so this one kernel is all that the diffusion ops need.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

constexpr int kMixMaxInputs = 48;
constexpr int kMixMaxOutputs = 48;
constexpr int kMixMaxPairs = 256;

struct MixArgs {
  DType dtype = DType::f32;
  int64_t batch = 0, count = 0;
  int inputs = 0, outputs = 0, pairs = 0;
  const void* in[kMixMaxInputs] = {nullptr};
  int64_t in_stride[kMixMaxInputs] = {0};  // elements from sample to sample; 0: one sample for all
  void* out[kMixMaxOutputs] = {nullptr};   // sample stride is count
  // (outputs, inputs + 1) per sample; an input whose coefficient is 0 is not read.
  const double* coefficients = nullptr;
  int64_t coefficient_stride = 0;
  int pair[kMixMaxPairs][2] = {};
  double* products = nullptr;  // (batch, pairs)
};

struct MixKernels {
  // Counts are checked by the caller; batch and count may be 0.
  void (*run)(const MixArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const MixKernels& mix_kernels();

// The CUDA kernels, in a library of their own. Pointers of inputs, outputs, products and `partials` are device memory,
// and so are the coefficients unless `numbers`: then they are the host's, read before this returns. `partials` holds
// mix_cuda_partials doubles; `stream` is a cudaStream_t of the current device. Returns the message of an error, or
// nullptr.
int64_t mix_cuda_partials(const MixArgs&);
const char* mix_cuda(const MixArgs&, bool numbers, double* partials, void* stream);

}  // namespace transfuse
