// Saliency maps from the activations A and gradients G of a layer, (batch, channels, locations) each.
//
// Gradient-weighted maps reduce channels to one number per location, some of them with a weight per channel that is
// pooled from all locations first (Grad-CAM and its relatives). NormGrad maps are a norm, a sum or a maximum over all
// entries of the outer product of the gradient at a location with the activations of a neighbourhood. Such a product
// is never formed: the norm of an outer product is the product of norms, its sum the product of sums, the square of
// its positive part that of both positive plus that of both negative parts, and its largest entry one of four products
// of extremes. So statistics of each tensor at each location are enough, those of a neighbourhood being sums (or
// extremes) of them.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

// hirescam is the linear approximation too.
enum class MapMethod : int { gradcam = 0, gradcam_pp, xgradcam, layercam, hirescam, elementwise };
enum class Phase1 : int { scaling = 0, bias, conv, depthwise };
enum class Phase2 : int { norm = 0, filter_norm, sum, max };

// Elements between neighbours along each axis.
struct SaliencyTensor {
  const void* ptr = nullptr;
  int64_t batch = 0, channel = 0, location = 0;
};

struct GradMapArgs {
  DType dtype = DType::f32;
  MapMethod method = MapMethod::gradcam;
  int64_t batch = 0, channels = 0, locations = 0;
  SaliencyTensor act, grad;
  void* out = nullptr;  // (batch, locations), float; double for f64
};

// Locations are those of a grid (depth, rows, columns), rows in order. The neighbourhoods are what a convolution with
// this geometry sees: `grid` of the activations, `out_grid` of the gradients. They are equal, and the geometry is not
// read, in phases `scaling` and `bias`; in phase `depthwise` they are equal and kernels are 1 or 3 with padding 0 or 1.
struct NormGradArgs {
  DType dtype = DType::f32;
  Phase1 phase1 = Phase1::conv;
  Phase2 phase2 = Phase2::norm;
  int64_t batch = 0, act_channels = 0, grad_channels = 0;
  int64_t grid[3] = {1, 1, 1}, out_grid[3] = {1, 1, 1};
  int64_t kernel[3] = {1, 1, 1}, step[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};
  SaliencyTensor act, grad;
  void* out = nullptr;  // (batch, locations of out_grid), float; double for f64
};

struct SaliencyKernels {
  void (*grad_map)(const GradMapArgs&, const Parallel&);
  void (*normgrad)(const NormGradArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const SaliencyKernels& saliency_kernels();

// The CUDA kernels, in a library of their own. All pointers are device memory; `memory` holds as many numbers of the
// type of `out` as the function beside it says; `stream` is a cudaStream_t of the current device. The message of an
// error, or nullptr.
int64_t grad_map_cuda_memory(const GradMapArgs&);
const char* grad_map_cuda(const GradMapArgs&, void* memory, void* stream);
int64_t normgrad_cuda_memory(const NormGradArgs&);
const char* normgrad_cuda(const NormGradArgs&, void* memory, void* stream);

}  // namespace transfuse
