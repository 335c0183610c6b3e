// Registration of row_codes: schema, checks, and the CPU kernel.
#include "transfuse/row_codes.h"

#include "torch_glue.h"

namespace transfuse {
namespace {

// Codes (N, 2), and numbers of NaNs and of numbers below the first edge.
std::tuple<Tensor, Tensor> row_codes(const Tensor& x, const OptionalTensor& edges, bool wrap) {
  RowCodesArgs a;
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2, "x must be a CPU tensor of 2 axes (rows, columns)");
  a.dtype = dtype_of(x, "x");
  a.x = x.const_data_ptr();
  a.rows = x.size(0), a.columns = x.size(1);
  a.stride[0] = x.stride(0), a.stride[1] = x.stride(1);
  a.wrap = wrap;
  if (edges.has_value()) {
    STD_TORCH_CHECK(edges->is_cpu() && edges->is_contiguous() && edges->scalar_type() == ScalarType::Float &&
                        edges->dim() == 1 && edges->size(0) >= 1 && edges->size(0) < (int64_t(1) << 31),
                    "edges must be a contiguous float32 CPU tensor of 1 axis and at least 1 entry");
    a.edges = static_cast<const float*>(edges->const_data_ptr());
    a.edge_count = edges->size(0);
  }
  Tensor codes = new_empty(x, {a.rows, 2}, ScalarType::Long), counts = new_zeros(x, {2}, ScalarType::Long);
  a.codes = static_cast<int64_t*>(codes.mutable_data_ptr());
  a.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  if (a.rows > 0) row_codes_kernels().run(a, torch_parallel());
  return {codes, counts};
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("row_codes(Tensor x, Tensor? edges, bool wrap) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) { m.impl("row_codes", TORCH_BOX(&transfuse::row_codes)); }
