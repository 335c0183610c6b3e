// Registration of the simplex ops: schemas, checks, and the CPU kernels.
#include "transfuse/simplex.h"

#include "torch_glue.h"

namespace transfuse {
namespace {

// A contiguous float64 CPU tensor of shape (problems, n, ..., n).
const double* doubles(const Tensor& t, const std::vector<int64_t>& shape, const char* name) {
  check_shape(t, shape, name);
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Double, name,
                  " must be a contiguous float64 CPU tensor");
  return static_cast<const double*>(t.const_data_ptr());
}

int64_t unknowns(const Tensor& matrices, int64_t most, const char* name) {
  STD_TORCH_CHECK(matrices.dim() == 3, name, " must have 3 axes, got ", matrices.dim());
  const int64_t n = matrices.size(1);
  STD_TORCH_CHECK(1 <= n && n <= most, name, " must have between 1 and ", most, " rows, got ", n);
  return n;
}

std::tuple<Tensor, Tensor> nonneg_qp(const Tensor& g, const Tensor& q, int64_t iterations, double tolerance) {
  NonnegativeArgs args;
  args.n = unknowns(g, kProgrammeMost, "g");
  args.problems = g.size(0);
  args.g = doubles(g, {args.problems, args.n, args.n}, "g");
  args.q = doubles(q, {args.problems, args.n}, "q");
  args.iterations = iterations;
  args.tolerance = tolerance;
  Tensor x = new_empty(g, {args.problems, args.n}, ScalarType::Double);
  Tensor residual = new_empty(g, {args.problems}, ScalarType::Double);
  args.x = static_cast<double*>(x.mutable_data_ptr());
  args.residual = static_cast<double*>(residual.mutable_data_ptr());
  if (args.problems > 0) simplex_kernels().nonnegative(args, torch_parallel());
  return {x, residual};
}

Tensor min_norm_simplex(const Tensor& c) {
  MinNormArgs args;
  args.n = unknowns(c, kProgrammeMost, "c");
  args.problems = c.size(0);
  args.c = doubles(c, {args.problems, args.n, args.n}, "c");
  Tensor w = new_empty(c, {args.problems, args.n}, ScalarType::Double);
  args.w = static_cast<double*>(w.mutable_data_ptr());
  if (args.problems > 0) simplex_kernels().min_norm(args, torch_parallel());
  return w;
}

std::tuple<Tensor, Tensor> pareto_lp(const Tensor& c, const Tensor& a, bool guide) {
  ParetoArgs args;
  args.n = unknowns(c, kParetoMost, "c");
  args.problems = c.size(0);
  args.c = doubles(c, {args.problems, args.n, args.n}, "c");
  args.a = doubles(a, {args.problems, args.n}, "a");
  args.guide = guide;
  Tensor w = new_empty(c, {args.problems, args.n}, ScalarType::Double);
  Tensor status = new_empty(c, {args.problems}, ScalarType::Long);
  args.w = static_cast<double*>(w.mutable_data_ptr());
  args.status = static_cast<int64_t*>(status.mutable_data_ptr());
  if (args.problems > 0) simplex_kernels().pareto(args, torch_parallel());
  return {w, status};
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("nonneg_qp(Tensor g, Tensor q, int iterations, float tolerance) -> (Tensor, Tensor)");
  m.def("min_norm_simplex(Tensor c) -> Tensor");
  m.def("pareto_lp(Tensor c, Tensor a, bool guide) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("nonneg_qp", TORCH_BOX(&transfuse::nonneg_qp));
  m.impl("min_norm_simplex", TORCH_BOX(&transfuse::min_norm_simplex));
  m.impl("pareto_lp", TORCH_BOX(&transfuse::pareto_lp));
}
