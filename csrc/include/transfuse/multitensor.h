// Work on lists of tensors (the parameters of models) without putting them end to end.
//
// Block j is the j-th tensor of every list; all lists agree in its number of elements and no more. Every kernel walks
// the same table of chunks (see multitensor_chunks.h): tensors of one element and of 5e7 share a call, chunks depend on
// the sizes alone, and partial sums are added in the order of the chunks, so results do not depend on the number of
// threads. Arithmetic is float, or double for blocks in which any tensor is double; results are rounded once.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

// One tensor, contiguous; a null pointer where it is absent.
struct Flat {
  const void* ptr = nullptr;
  DType dtype = DType::f32;
};

// Which of `count` coefficients each element of a block has.
struct Partition {
  int count = 1;
  const void* const* ids = nullptr;  // per block: bytes, or 16-bit numbers if `wide`; count or more: no coefficient
  bool wide = false;
  const int64_t* keys = nullptr;  // per block, if there are no ids: hashed from the number of the element
};

// out_j = base_j + sum_i coefficient[i, j, partition] list_ij
struct LincombArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  int lists = 0;
  const Flat* base = nullptr;    // (blocks), or nullptr
  const Flat* deltas = nullptr;  // (lists, blocks)
  const Flat* out = nullptr;     // (blocks), written
  Partition partition;
  const double* coefficients = nullptr;  // (lists, blocks, partitions)
};

// sums[i, j, partition] = sum over elements of grad_j list_ij
struct BlockDotsArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  int lists = 0;
  const Flat* grads = nullptr;   // (blocks)
  const Flat* deltas = nullptr;  // (lists, blocks)
  Partition partition;
  double* sums = nullptr;  // (lists, blocks, partitions)
};

// out_sj = sum_k w[s, k] F_kj x_kj / sum_k w[s, k] F_kj with F >= floor[k]; x_0j where the denominator is 0.
struct RatioArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  int models = 0, settings = 0;
  const Flat* thetas = nullptr;          // (models, blocks)
  const Flat* weights = nullptr;         // (models, blocks)
  const Flat* out = nullptr;             // (settings, blocks), written
  const double* coefficients = nullptr;  // (settings, models)
  const double* floors = nullptr;        // (models)
  int64_t* refused = nullptr;            // one number: weights that are negative or not finite
};

// products[i, k] = sum over all blocks of list_i list_k; absent tensors are 0.
struct GramArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  int lists = 0;
  const Flat* x = nullptr;     // (lists, blocks)
  double* products = nullptr;  // (lists, lists)
};

// sums[j] over elements of (x_j scale_j)^2, |x_j scale_j|, or their largest
struct NormArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  const Flat* x = nullptr;      // (blocks)
  const Flat* scale = nullptr;  // (blocks), or nullptr
  int order = 2;                // 2, 1, or 0 for the largest
  double* sums = nullptr;       // (blocks)
};

// backup_j = x_j, then x_j += factor grad_j, or factor x_j^2 grad_j
struct PerturbArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  const Flat* x = nullptr;       // written
  const Flat* grads = nullptr;   // (blocks)
  const Flat* backup = nullptr;  // (blocks) of the types of x, written
  double factor = 0.0;
  bool adaptive = false;
};

// to_j = from_j, bit by bit
struct CopyArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  const Flat* to = nullptr;  // written
  const Flat* from = nullptr;
};

// The rank-th smallest of all |x_j|, rank from 0; NaN counts as largest.
struct SelectArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  const Flat* x = nullptr;  // of one type
  int64_t rank = 0;
  double* value = nullptr;
};

// out_j = base_j + scale mean of those list_ij, |list_ij| >= threshold[i], whose sign is that of their sum
struct ElectArgs {
  int64_t blocks = 0;
  const int64_t* size = nullptr;
  int lists = 0;
  const Flat* base = nullptr;    // (blocks), or nullptr
  const Flat* deltas = nullptr;  // (lists, blocks)
  const Flat* out = nullptr;     // (blocks), written
  const double* thresholds = nullptr;
  double scale = 1.0;
};

// Sizes and types are checked by the caller; any size may be 0.
struct MultitensorKernels {
  void (*lincomb)(const LincombArgs&, const Parallel&);
  void (*block_dots)(const BlockDotsArgs&, const Parallel&);
  void (*ratio)(const RatioArgs&, const Parallel&);
};
struct MultitensorSumKernels {
  void (*gram)(const GramArgs&, const Parallel&);
  void (*norm)(const NormArgs&, const Parallel&);
  void (*perturb)(const PerturbArgs&, const Parallel&);
  void (*copy)(const CopyArgs&, const Parallel&);
  void (*select)(const SelectArgs&, const Parallel&);
  void (*elect)(const ElectArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const MultitensorKernels& multitensor_kernels();
const MultitensorSumKernels& multitensor_sum_kernels();

// The CUDA kernels, in a library of their own. Tensors, ids, coefficients and results are device memory; sizes, keys,
// floors and the blocks themselves are the host's, read before a call returns. `memory` holds as many 8-byte words as
// the function beside it says; `stream` is a cudaStream_t of the current device. All return the message of an error,
// or nullptr.
int64_t lincomb_cuda_memory(const LincombArgs&);
const char* lincomb_cuda(const LincombArgs&, void* memory, void* stream);
int64_t block_dots_cuda_memory(const BlockDotsArgs&);
const char* block_dots_cuda(const BlockDotsArgs&, void* memory, void* stream);
int64_t ratio_cuda_memory(const RatioArgs&);
const char* ratio_cuda(const RatioArgs&, void* memory, void* stream);
int64_t gram_cuda_memory(const GramArgs&);
const char* gram_cuda(const GramArgs&, void* memory, void* stream);
int64_t norm_cuda_memory(const NormArgs&);
const char* norm_cuda(const NormArgs&, void* memory, void* stream);
// The factor is `factor`, on the device, not that of the arguments.
int64_t perturb_cuda_memory(const PerturbArgs&);
const char* perturb_cuda(const PerturbArgs&, const double* factor, void* memory, void* stream);
int64_t copy_cuda_memory(const CopyArgs&);
const char* copy_cuda(const CopyArgs&, void* memory, void* stream);

}  // namespace transfuse
