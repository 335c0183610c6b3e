// Adaptive instance normalisation (adain): arguments of the kernels, and its mathematics per statistic.
//
// A content plane x (n elements of one remaining index) and its style plane y (m elements) give
//   out = std_y / (std_x + eps) * (x - mean_x) + mean_y,      std unbiased; 0 for one element.
// Its backward, its Jacobian-vector product and the gradient of the latter all have one form: a plane of the result is
//   sum_k factor_k (t_k - mean t_k) + offset
// over the one to three input planes t_k, with factors made from the planes' means and co-moments. So every direction
// is one pass of moments and one pass of writing; what differs is the few lines of arithmetic below, which the CPU
// kernels and the CUDA kernels share.
#pragma once

#include <cmath>

#include "transfuse/parallel.h"
#include "transfuse/types.h"

// Functions here are static: each ISA level and the device compile their own, and none may stand in for another.
#if defined(__CUDACC__)
#define TRANSFUSE_HD __host__ __device__
#else
#define TRANSFUSE_HD
#endif

namespace transfuse {

constexpr int kAdainMaxRank = 12;

enum class AdainDirection : int { forward = 0, backward, jvp, jvp_backward };

// Input planes in this order. Content side: x; x, grad; x, x_t; x, grad, x_t. Style side: y; y; y, y_t; y, y_t.
TRANSFUSE_HD static constexpr int adain_content_inputs(AdainDirection d) {
  return d == AdainDirection::forward ? 1 : d == AdainDirection::jvp_backward ? 3 : 2;
}
TRANSFUSE_HD static constexpr int adain_style_inputs(AdainDirection d) {
  return d == AdainDirection::forward || d == AdainDirection::backward ? 1 : 2;
}

// A tensor in the axis order of the call; ptr == nullptr means "absent" (an output that is not wanted).
struct AdainTensor {
  void* ptr = nullptr;
  int64_t stride[kAdainMaxRank] = {0};
};

struct AdainArgs {
  DType dtype = DType::f32;
  int rank = 0;
  int64_t content_size[kAdainMaxRank] = {0};
  int64_t style_size[kAdainMaxRank] = {0};  // of an axis that is not reduced: as the content's, or 1
  bool reduced[kAdainMaxRank] = {false};
  double eps = 0.0;
  AdainTensor content[3], style[2];  // inputs, see above
  AdainTensor out, style_out;        // content-like result; gradient of the style (backward directions)
};

struct AdainKernels {
  // Sizes are checked by the caller; content and style planes have at least one element.
  void (*run)(AdainDirection, const AdainArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const AdainKernels& adain_kernels();

// The CUDA kernels, in a library of their own. Pointers are device memory; `moments` holds one AdainMoments per style
// plane, `shares` one AdainShare per content plane (nullptr if there is no style_out); `stream` is a cudaStream_t of
// the current device. Returns the message of an error, or nullptr.
const char* adain_cuda(AdainDirection, const AdainArgs&, void* moments, void* shares, void* stream);

// ---- mathematics of one statistic ------------------------------------------------------------------------------

// Means and centred co-moments of up to three planes: second[] holds sums over (0,0), (0,1), (0,2), (1,2).
struct AdainMoments {
  double count = 0.0;
  double mean[3] = {0.0, 0.0, 0.0};
  double second[4] = {0.0, 0.0, 0.0, 0.0};
};

// result = sum_k factor[k] (t_k - mean t_k) + offset.
struct AdainCoefficients {
  double factor[3] = {0.0, 0.0, 0.0};
  double offset = 0.0;
};

// What one content plane adds to the gradient of its style plane, by way of the statistics it uses.
struct AdainShare {
  double mean = 0.0, std = 0.0, std_tangent = 0.0;
};

TRANSFUSE_HD static inline double adain_std(double count, double second) {
  return count > 1.0 ? sqrt(second / (count - 1.0)) : 0.0;
}
// 1/x, and 0 for 0: a constant plane has nothing to scale, and the derivative of its std is taken as 0. NaN stays NaN.
TRANSFUSE_HD static inline double adain_inverse(double x) { return x == 0.0 ? 0.0 : 1.0 / x; }
// d std / d t_i = adain_slope * (t_i - mean).
TRANSFUSE_HD static inline double adain_slope(double count, double std) {
  return count > 1.0 ? adain_inverse((count - 1.0) * std) : 0.0;
}

TRANSFUSE_HD static inline void adain_content_rule(AdainDirection direction, double eps, const AdainMoments& x,
                                                   const AdainMoments& y, AdainCoefficients* out, AdainShare* share) {
  const double std = adain_std(x.count, x.second[0]), style_std = adain_std(y.count, y.second[0]);
  const double scale = adain_inverse(std + eps), slope = adain_slope(x.count, std);
  const double gain = style_std * scale;
  switch (direction) {
    case AdainDirection::forward:
      out->factor[0] = gain;
      out->offset = y.mean[0];
      return;
    case AdainDirection::backward: {
      const double gx = x.second[1];  // sum grad (x - mean)
      out->factor[0] = -gain * scale * gx * slope;
      out->factor[1] = gain;
      share->mean = x.count * x.mean[1];
      share->std = gx * scale;
      return;
    }
    case AdainDirection::jvp: {
      const double std_t = x.second[1] * slope;
      const double style_std_t = y.second[1] * adain_slope(y.count, style_std);
      out->factor[0] = (style_std_t - gain * std_t) * scale;
      out->factor[1] = gain;
      out->offset = y.mean[1];
      return;
    }
    case AdainDirection::jvp_backward: {
      const double gx = x.second[1], gt = x.second[3];  // sum grad (x - mean), sum grad (x_t - mean)
      const double std_t = x.second[2] * slope;
      const double style_std_t = y.second[1] * adain_slope(y.count, style_std);
      const double by_std_t = -gx * gain * scale;
      const double by_std = scale * (gx * scale * (2.0 * gain * std_t - style_std_t) - gain * gt);
      out->factor[0] = (by_std - by_std_t * std_t * adain_inverse(std)) * slope;
      out->factor[1] = (style_std_t - gain * std_t) * scale;
      out->factor[2] = by_std_t * slope;
      share->std = scale * (gt - gx * std_t * scale);
      share->std_tangent = gx * scale;
      return;
    }
  }
}

// Gradient of the style plane from the sum of the shares of the content planes that use it.
TRANSFUSE_HD static inline void adain_style_rule(AdainDirection direction, const AdainMoments& y,
                                                 const AdainShare& share, AdainCoefficients* out) {
  const double std = adain_std(y.count, y.second[0]), slope = adain_slope(y.count, std);
  if (direction == AdainDirection::backward) {
    out->factor[0] = share.std * slope;
    out->offset = share.mean / y.count;
  } else {
    const double std_t = y.second[1] * slope;
    out->factor[0] = (share.std - share.std_tangent * std_t * adain_inverse(std)) * slope;
    out->factor[1] = share.std_tangent * slope;
  }
}

// Adds the moments of further elements (Chan, Golub & LeVeque). Means that agree exactly stay exact.
TRANSFUSE_HD static inline void adain_merge(int tensors, const AdainMoments& more, AdainMoments* m) {
  if (more.count == 0.0) return;
  const double total = m->count + more.count, part = more.count / total, cross = m->count * part;
  double gap[3];
  for (int k = 0; k < tensors; ++k) {
    gap[k] = more.mean[k] - m->mean[k];
    m->mean[k] += gap[k] * part;
  }
  m->second[0] += more.second[0] + gap[0] * gap[0] * cross;
  if (tensors > 1) m->second[1] += more.second[1] + gap[0] * gap[1] * cross;
  if (tensors > 2) {
    m->second[2] += more.second[2] + gap[0] * gap[2] * cross;
    m->second[3] += more.second[3] + gap[1] * gap[2] * cross;
  }
  m->count = total;
}

}  // namespace transfuse
