// Sums of Gaussian (or inverse multiquadric) kernels and of their products over all pairs of two sets of points,
// without a matrix of them:
//
//   r_p[i] = sum_j w_j prod_{f in p} k_f(x_i, y_j),    k = exp(-D / (2 h^2)) or 1 / (1 + D / h^2),  D = |x_i - y_j|^2
//
// A kernel names a pair of point sets ("distances", shared by the kernels that name it) and has a bandwidth h; a
// product is a mask of kernels. Where all distances are of a set to itself, a tile serves its mirror image too.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

constexpr int kMaxKernelPoints = 8, kMaxKernelDistances = 8, kMaxKernels = 16, kMaxKernelProducts = 16;

// One set of points (groups, count, width); strides count elements.
struct KernelPoints {
  const void* data = nullptr;
  int64_t count = 0, width = 0;
  int64_t stride[3] = {0, 0, 0};
};

struct KernelSumsArgs {
  DType dtype = DType::f32;  // of the points
  bool inverse = false;      // 1 / (1 + D / h^2)
  bool exclude = false;      // leave out pairs (i, i); rows == columns
  int64_t groups = 0, rows = 0, columns = 0;
  int points = 0, distances = 0, kernels = 0, products = 0;
  KernelPoints point[kMaxKernelPoints];
  int row_points[kMaxKernelDistances] = {0}, column_points[kMaxKernelDistances] = {0};  // (equal: to itself)
  int distance_of[kMaxKernels] = {0};
  uint32_t mask[kMaxKernelProducts] = {0};
  const double* bandwidths = nullptr;  // (groups, kernels), positive
  const double* weights = nullptr;     // (groups, columns); nullptr: 1
  double* sums = nullptr;              // (groups, products, rows)

  // For the gradient of sum_p,i grads[p, i] r_p[i]:
  const double* grads = nullptr;                    // (groups, products, rows)
  void* point_grads[kMaxKernelPoints] = {nullptr};  // (groups, count, width), float (double for f64); nullptr: not
                                                    // wanted
  double* bandwidth_grads = nullptr;                // (groups, kernels); nullptr: not wanted
};

struct KernelSumsKernels {
  void (*forward)(const KernelSumsArgs&, const Parallel&);
  void (*backward)(const KernelSumsArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const KernelSumsKernels& kernel_sums_kernels();

}  // namespace transfuse
