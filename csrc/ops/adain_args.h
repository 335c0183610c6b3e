// What the CPU and the CUDA registration of adain share: checks, and a call as the kernels take it.
#pragma once

#include <cmath>

#include "torch_glue.h"
#include "transfuse/adain.h"

namespace transfuse {

// What the schema takes, before any result exists.
struct AdainCall {
  AdainArgs args;
  bool empty = false;  // no content element: nothing to compute
};

inline AdainTensor adain_tensor(const Tensor& t) {
  AdainTensor a;
  a.ptr = const_cast<void*>(t.const_data_ptr());
  for (int64_t d = 0; d < t.dim(); ++d) a.stride[d] = t.stride(d);
  return a;
}

inline AdainTensor adain_result(const Tensor& t) {
  AdainTensor a = adain_tensor(t);
  a.ptr = t.mutable_data_ptr();
  return a;
}

inline AdainCall adain_call(const Tensor& content, const Tensor& style, const std::vector<int64_t>& dims, double eps) {
  AdainCall call;
  AdainArgs& a = call.args;
  STD_TORCH_CHECK(content.dim() >= 1 && content.dim() <= kAdainMaxRank, "content must have 1 to ", kAdainMaxRank,
                  " axes, got ", content.dim());
  STD_TORCH_CHECK(style.dim() == content.dim(), "style must have as many axes as content");
  STD_TORCH_CHECK(style.scalar_type() == content.scalar_type(), "style must have the dtype of content");
  STD_TORCH_CHECK(style.device() == content.device(), "style must be on the device of content");
  STD_TORCH_CHECK(eps >= 0.0 && std::isfinite(eps), "eps must be finite and not negative, got ", eps);
  STD_TORCH_CHECK(!dims.empty(), "dims must name at least one axis");
  a.dtype = dtype_of(content, "content");
  a.rank = (int)content.dim();
  a.eps = eps;
  for (const int64_t d : dims) {
    STD_TORCH_CHECK(d >= 0 && d < a.rank && !a.reduced[d], "dims must be different axes in 0..", a.rank - 1);
    a.reduced[d] = true;
  }
  bool style_empty = false;
  for (int d = 0; d < a.rank; ++d) {
    a.content_size[d] = content.size(d);
    a.style_size[d] = style.size(d);
    STD_TORCH_CHECK(a.reduced[d] || a.style_size[d] == a.content_size[d] || a.style_size[d] == 1, "style axis ", d,
                    " must be 1 or ", a.content_size[d], ", got ", a.style_size[d]);
    call.empty = call.empty || a.content_size[d] == 0;
    style_empty = style_empty || a.style_size[d] == 0;
  }
  STD_TORCH_CHECK(call.empty || !style_empty, "style must have at least one element per statistic");
  a.content[0] = adain_tensor(content);
  a.style[0] = adain_tensor(style);
  return call;
}

// A further input in the shape, dtype and place of `like`.
inline AdainTensor adain_companion(const Tensor& t, const Tensor& like, const char* name) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < like.dim(); ++d) shape.push_back(like.size(d));
  check_shape(t, shape, name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.device() == like.device(), name,
                  " must have the dtype and device of what it belongs to");
  return adain_tensor(t);
}

// The four ops over a launcher `run(direction, args, content)`, which computes every result that has a pointer.
template <class Run>
struct AdainOps {
  static Tensor forward(const Tensor& content, const Tensor& style, const std::vector<int64_t>& dims, double eps) {
    AdainCall call = adain_call(content, style, dims, eps);
    Tensor out = torch::stable::empty_like(content);
    call.args.out = adain_result(out);
    if (!call.empty) Run::run(AdainDirection::forward, call.args, content);
    return out;
  }

  static Tensor jvp(const Tensor& content, const Tensor& style, const Tensor& content_t, const Tensor& style_t,
                    const std::vector<int64_t>& dims, double eps) {
    AdainCall call = adain_call(content, style, dims, eps);
    call.args.content[1] = adain_companion(content_t, content, "content_t");
    call.args.style[1] = adain_companion(style_t, style, "style_t");
    Tensor out = torch::stable::empty_like(content);
    call.args.out = adain_result(out);
    if (!call.empty) Run::run(AdainDirection::jvp, call.args, content);
    return out;
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& content, const Tensor& style,
                                             const std::vector<int64_t>& dims, double eps, bool content_grad,
                                             bool style_grad) {
    AdainCall call = adain_call(content, style, dims, eps);
    call.args.content[1] = adain_companion(grad, content, "grad");
    return gradients(AdainDirection::backward, call, content, style, content_grad, style_grad);
  }

  static std::tuple<Tensor, Tensor> jvp_backward(const Tensor& grad, const Tensor& content, const Tensor& style,
                                                 const Tensor& content_t, const Tensor& style_t,
                                                 const std::vector<int64_t>& dims, double eps, bool content_grad,
                                                 bool style_grad) {
    AdainCall call = adain_call(content, style, dims, eps);
    call.args.content[1] = adain_companion(grad, content, "grad");
    call.args.content[2] = adain_companion(content_t, content, "content_t");
    call.args.style[1] = adain_companion(style_t, style, "style_t");
    return gradients(AdainDirection::jvp_backward, call, content, style, content_grad, style_grad);
  }

 private:
  // A gradient that is not wanted is an empty tensor.
  static std::tuple<Tensor, Tensor> gradients(AdainDirection direction, AdainCall& call, const Tensor& content,
                                              const Tensor& style, bool content_grad, bool style_grad) {
    Tensor to_content =
        content_grad ? torch::stable::empty_like(content) : new_empty(content, {0}, content.scalar_type());
    Tensor to_style = style_grad ? torch::stable::empty_like(style) : new_empty(style, {0}, style.scalar_type());
    if (content_grad) call.args.out = adain_result(to_content);
    if (style_grad) call.args.style_out = adain_result(to_style);
    if (call.empty) {
      if (style_grad) torch::stable::zero_(to_style);
    } else if (content_grad || style_grad) {
      Run::run(direction, call.args, content);
    }
    return {to_content, to_style};
  }
};

}  // namespace transfuse
