// Gradient and Hessian diagonal of a linear softmax or binary head, per domain (a stretch of the samples).
//
// A domain of n samples x (with a 1 behind them where there is a bias, so D = d + 1 columns; else D = d), p = softmax(W
// x), or sigmoid for one output, gives
//   gradient  (1/n) sum (p - y) x^T          diagonal  (1/n) sum p (1 - p) (x * x)^T          (C x D)
// Forward: a product over the columns (logits), a row of arithmetic, a product over the samples of each domain.
// Backward the same twice over. Squares and the column of ones are made where a block is read, all domains go in one
// call, and nothing larger than x, W and the result exists.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

enum class HeadKind : int { gradient = 0, diagonal };

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
  void* out = nullptr;                                         // E x C x D
  void* p = nullptr;                                           // N x C: made by forward, read by backward
  void* rest = nullptr;                                        // N x C: 1 - p
  const void* grad = nullptr;                                  // E x C x D
  void* x_grad = nullptr;                                      // N x d; nullptr: not wanted, as the next
  void* weight_grad = nullptr;                                 // C x d
  void* bias_grad = nullptr;                                   // C; wanted with weight_grad where there is a bias
};

struct HeadKernels {
  void (*forward)(const HeadArgs&, const Parallel&);
  void (*backward)(const HeadArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const HeadKernels& head_kernels();

}  // namespace transfuse
