// Registration of kernel_sums: schemas, checks, and the CPU kernels.
#include "transfuse/kernel_sums.h"

#include "torch_glue.h"

namespace transfuse {
namespace {

using Ints = std::vector<int64_t>;

void check_count(int64_t got, int64_t most, const char* name) {
  STD_TORCH_CHECK(got >= 1 && got <= most, "there must be 1 to ", most, " ", name, ", got ", got);
}

int index_of(int64_t got, int64_t bound, const char* name) {
  STD_TORCH_CHECK(got >= 0 && got < bound, name, " must have entries in [0, ", bound, "), got ", got);
  return (int)got;
}

const double* doubles(const Tensor& t, const Ints& shape, const char* name) {
  check_shape(t, shape, name);
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Double, name,
                  " must be a contiguous float64 CPU tensor");
  return static_cast<const double*>(t.const_data_ptr());
}

KernelSumsArgs kernel_sums_args(const TensorList& points, const Ints& distances, const Ints& kernels,
                                const Tensor& bandwidths, const Ints& products, const OptionalTensor& weights,
                                bool inverse, bool exclude) {
  KernelSumsArgs a;
  a.inverse = inverse;
  a.exclude = exclude;
  check_count((int64_t)points.size(), kMaxKernelPoints, "sets of points");
  check_count((int64_t)distances.size() / 2, kMaxKernelDistances, "distances");
  check_count((int64_t)kernels.size(), kMaxKernels, "kernels");
  check_count((int64_t)products.size(), kMaxKernelProducts, "products");
  STD_TORCH_CHECK(distances.size() % 2 == 0, "distances must be pairs");
  a.points = (int)points.size(), a.distances = (int)distances.size() / 2;
  a.kernels = (int)kernels.size(), a.products = (int)products.size();
  a.dtype = dtype_of(points[0], "points");
  for (int p = 0; p < a.points; ++p) {
    const Tensor& t = points[(size_t)p];
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && t.scalar_type() == points[0].scalar_type(),
                    "points must be CPU tensors of 3 axes (groups, count, width) and one dtype");
    STD_TORCH_CHECK(t.size(0) == points[0].size(0), "points must have as many groups");
    a.point[p].data = t.const_data_ptr();
    a.point[p].count = t.size(1), a.point[p].width = t.size(2);
    for (int64_t d = 0; d < 3; ++d) a.point[p].stride[d] = t.stride(d);
  }
  a.groups = points[0].size(0);
  for (int s = 0; s < a.distances; ++s) {
    a.row_points[s] = index_of(distances[(size_t)(2 * s)], a.points, "distances");
    a.column_points[s] = index_of(distances[(size_t)(2 * s + 1)], a.points, "distances");
    const KernelPoints &x = a.point[a.row_points[s]], &y = a.point[a.column_points[s]];
    if (s == 0) a.rows = x.count, a.columns = y.count;
    STD_TORCH_CHECK(x.width == y.width, "points of a distance must have one width");
    STD_TORCH_CHECK(x.count == a.rows && y.count == a.columns, "distances must have as many rows and columns");
  }
  STD_TORCH_CHECK(!exclude || a.rows == a.columns, "without the diagonal there must be as many rows as columns");
  for (int f = 0; f < a.kernels; ++f) a.distance_of[f] = index_of(kernels[(size_t)f], a.distances, "kernels");
  for (int p = 0; p < a.products; ++p) {
    const int64_t mask = products[(size_t)p];
    STD_TORCH_CHECK(mask > 0 && mask < (int64_t(1) << a.kernels), "products must be masks of kernels, got ", mask);
    a.mask[p] = (uint32_t)mask;
  }
  a.bandwidths = doubles(bandwidths, {a.groups, a.kernels}, "bandwidths");
  if (weights.has_value()) a.weights = doubles(*weights, {a.groups, a.columns}, "weights");
  return a;
}

Tensor kernel_sums(const TensorList& points, const Ints& distances, const Ints& kernels, const Tensor& bandwidths,
                   const Ints& products, const OptionalTensor& weights, bool inverse, bool exclude) {
  KernelSumsArgs a = kernel_sums_args(points, distances, kernels, bandwidths, products, weights, inverse, exclude);
  Tensor out = new_empty(bandwidths, {a.groups, a.products, a.rows}, ScalarType::Double);
  if (a.groups * a.rows == 0) return out;
  a.sums = static_cast<double*>(out.mutable_data_ptr());
  kernel_sums_kernels().forward(a, torch_parallel());
  return out;
}

// Gradients of the points (empty where not wanted) and of the bandwidths.
std::tuple<TensorList, Tensor> kernel_sums_backward(const Tensor& grad, const TensorList& points, const Ints& distances,
                                                    const Ints& kernels, const Tensor& bandwidths, const Ints& products,
                                                    const OptionalTensor& weights, bool inverse, bool exclude,
                                                    const Ints& wanted, bool bandwidths_wanted) {
  KernelSumsArgs a = kernel_sums_args(points, distances, kernels, bandwidths, products, weights, inverse, exclude);
  STD_TORCH_CHECK((int64_t)wanted.size() == a.points, "wanted must have an entry for each set of points");
  a.grads = doubles(grad, {a.groups, a.products, a.rows}, "grad");
  TensorList found;
  for (int p = 0; p < a.points; ++p) {
    const Ints shape{wanted[(size_t)p] != 0 ? a.groups : 0, a.point[p].count, a.point[p].width};
    found.push_back(new_zeros(points[0], shape, statistics_type(a.dtype)));
    if (wanted[(size_t)p] != 0) a.point_grads[p] = found.back().mutable_data_ptr();
  }
  Tensor to_bandwidths = new_zeros(bandwidths, {bandwidths_wanted ? a.groups : 0, a.kernels}, ScalarType::Double);
  if (bandwidths_wanted) a.bandwidth_grads = static_cast<double*>(to_bandwidths.mutable_data_ptr());
  if (a.groups * a.rows * a.columns > 0) kernel_sums_kernels().backward(a, torch_parallel());
  return {found, to_bandwidths};
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "kernel_sums(Tensor[] points, int[] distances, int[] kernels, Tensor bandwidths, int[] products, Tensor? "
      "weights, bool inverse, bool exclude) -> Tensor");
  m.def(
      "kernel_sums_backward(Tensor grad, Tensor[] points, int[] distances, int[] kernels, Tensor bandwidths, int[] "
      "products, Tensor? weights, bool inverse, bool exclude, int[] wanted, bool bandwidths_wanted) -> (Tensor[], "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("kernel_sums", TORCH_BOX(&transfuse::kernel_sums));
  m.impl("kernel_sums_backward", TORCH_BOX(&transfuse::kernel_sums_backward));
}
