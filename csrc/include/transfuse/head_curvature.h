// Gradient, Hessian diagonal and Hessian-vector product of a linear softmax or binary head, per domain (a stretch of
// the samples).
//
// A domain of n samples x (with a 1 behind them where there is a bias, so D = d + 1 columns; else D = d), p = softmax(W
// x), or sigmoid for one output, gives
//   gradient  (1/n) sum (p - y) x^T          diagonal  (1/n) sum p (1 - p) (x * x)^T          (C x D)
//   product   (1/n) sum J u x^T,  u = V x,  J u = p * (u - p.u)  (one output: p (1 - p) u)
// Forward: one or two products over the columns (logits, u), a row of arithmetic, a product over the samples of each
// domain. Backward the same twice over. Squares and the column of ones are made where a block is read, all domains go
// in one call, and nothing larger than x, W, V and the result exists.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

enum class HeadKind : int { gradient = 0, diagonal, product };

// All tensors are contiguous and of one type, float or double (f64).
struct HeadArgs {
  HeadKind kind = HeadKind::diagonal;
  bool f64 = false;
  int64_t samples = 0, columns = 0, classes = 0, domains = 0;  // N, d, C, E
  const int64_t* offsets = nullptr;                            // E + 1, ascending, no domain empty
  const void* x = nullptr;                                     // N x d
  const void* weight = nullptr;                                // C x d
  const void* bias = nullptr;                                  // C, or nullptr
  const void* targets = nullptr;                               // gradient: N x C, the y
  const void* vectors = nullptr;                               // product: E x C x D, the V
  bool shared = false;                                         // vectors are C x D, for all domains
  void* u = nullptr;                                           // product: N x C, made by forward
  void* out = nullptr;                                         // E x C x D
  void* p = nullptr;                                           // N x C: made by forward, read by backward
  void* rest = nullptr;                                        // N x C: 1 - p
  const void* grad = nullptr;                                  // E x C x D
  void* x_grad = nullptr;                                      // N x d; nullptr: not wanted
  bool head_grad = false;                                      // whether the two below are wanted (both may be empty)
  void* weight_grad = nullptr;                                 // C x d
  void* bias_grad = nullptr;                                   // C, where there is a bias
  void* vectors_grad = nullptr;                                // as vectors; nullptr: not wanted
};

struct HeadKernels {
  void (*forward)(const HeadArgs&, const Parallel&);
  void (*backward)(const HeadArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const HeadKernels& head_kernels();

// The CUDA kernels, in a library of their own. Tensors are device memory, offsets are the host's and read before a call
// returns. `memory` holds head_cuda_memory 8-byte words; `stream` is a cudaStream_t of the current device. The message
// of an error, or nullptr.
int64_t head_cuda_memory(const HeadArgs&, bool backward);
const char* head_forward_cuda(const HeadArgs&, void* memory, void* stream);
const char* head_backward_cuda(const HeadArgs&, void* memory, void* stream);

}  // namespace transfuse
