// transfuse._C: what is not a tensor op. Build and ISA report, and raw-pointer entry points that run the kernels on
// NumPy arrays with std::thread workers, without torch's dispatcher in the way (for NumPy users and for timing).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "transfuse/attention.h"
#include "transfuse/isa.h"
#include "transfuse/peak.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = TRANSFUSE_VERSION;
  info["torch_headers"] = TRANSFUSE_TORCH_VERSION;
  info["torch_abi_target"] = "2.10";
  info["compiler"] = TRANSFUSE_COMPILER;
  info["build_type"] = TRANSFUSE_BUILD_TYPE;
  return info;
}

py::list isa_report() {
  py::list report;
  for (const auto& level : transfuse::isa_levels()) {
    py::dict row;
    row["name"] = level.name;
    row["compiled"] = level.compiled;
    row["supported"] = level.supported;
    report.append(row);
  }
  return report;
}

using FloatArray = py::array_t<float>;

transfuse::View view_of(const FloatArray& a) {
  transfuse::View v;
  v.ptr = a.data();
  for (int i = 0; i < 4; ++i) {
    if (a.strides(i) % (py::ssize_t)sizeof(float) != 0) throw py::value_error("strides must be whole floats");
    v.stride[i] = a.strides(i) / (py::ssize_t)sizeof(float);
  }
  return v;
}

FloatArray attend_float32(const FloatArray& query, const FloatArray& key, const FloatArray& value,
                          std::optional<double> scale, int threads) {
  if (query.ndim() != 4 || key.ndim() != 4 || value.ndim() != 4)
    throw py::value_error("query, key and value must have 4 axes (batch, head, token, channel)");
  if (threads < 1) throw py::value_error("threads must be at least 1");
  transfuse::AttentionShape s{query.shape(0), query.shape(1), key.shape(1),         query.shape(2),
                              query.shape(3), value.shape(3), transfuse::DType::f32};
  const bool fits = key.shape(0) == s.batch && value.shape(0) == s.batch && value.shape(1) == s.kv_heads &&
                    value.shape(2) == key.shape(2) && key.shape(3) == s.key_dim && s.kv_heads > 0 &&
                    s.heads % s.kv_heads == 0 && s.key_dim >= 1 && s.key_dim <= 256 && s.value_dim >= 1 &&
                    s.value_dim <= 256;
  if (!fits) throw py::value_error("shapes of query, key and value do not fit together");
  transfuse::SourceView source;
  source.key = view_of(key);
  source.value = view_of(value);
  source.batch = s.batch;
  source.length = key.shape(2);
  source.scale = scale.has_value() ? *scale : 1.0 / std::sqrt((double)s.key_dim);
  FloatArray out({s.batch, s.heads, s.queries, s.value_dim});
  transfuse::MutableView target;
  target.ptr = out.mutable_data();
  for (int i = 0; i < 4; ++i) target.stride[i] = out.strides(i) / (py::ssize_t)sizeof(float);
  const transfuse::Weight gate;
  transfuse::AttentionForward args{s, view_of(query), {}, &source, 1, 1, &gate, target, nullptr};
  const auto& kernels = transfuse::attention_kernels();
  {
    py::gil_scoped_release release;
    kernels.forward(args, transfuse::std_thread_parallel(threads));
  }
  return out;
}

// FLOP/s of all threads together.
double measure_peak(double (*kernel)(double), int threads, double seconds) {
  if (threads < 1) throw py::value_error("threads must be at least 1");
  if (!(seconds > 0 && seconds <= 60)) throw py::value_error("seconds must be in (0, 60]");
  py::gil_scoped_release release;
  std::vector<double> rate((size_t)threads, 0.0);
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i)
    workers.emplace_back([&rate, i, kernel, seconds] { rate[(size_t)i] = kernel(seconds); });
  rate[0] = kernel(seconds);
  for (auto& w : workers) w.join();
  double total = 0;
  for (const double r : rate) total += r;
  return total;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build report and raw entry points of transfuse's CPU kernels.";
  m.def("build_info", &build_info, "Version, compiler and torch headers this binary was built with.");
  m.def("isa_report", &isa_report, "ISA levels: name, whether compiled in, whether this processor runs them.");
  m.def(
      "isa_in_use", [] { return transfuse::isa_name(transfuse::isa_in_use()); },
      "The ISA level the kernels run at (TRANSFUSE_CPU_ISA forces one; read once).");
  m.def(
      "measure_peak_flops",
      [](int threads, double seconds) { return measure_peak(transfuse::peak_kernels().fma_float, threads, seconds); },
      py::arg("threads"), py::arg("seconds"), "float32 multiply-add peak in FLOP/s at the ISA level in use, measured.");
  m.def(
      "measure_peak_bf16_flops",
      [](int threads, double seconds) { return measure_peak(transfuse::peak_kernels().dot_bf16, threads, seconds); },
      py::arg("threads"), py::arg("seconds"), "bf16 dot-product peak in FLOP/s; 0 where the processor has none.");
  m.def("attend_float32", &attend_float32, py::arg("query"), py::arg("key"), py::arg("value"), py::kw_only(),
        py::arg("scale") = py::none(), py::arg("threads") = 1,
        "softmax(scale * q k^T) v on float32 NumPy arrays (batch, head, token, channel), on std::thread workers.");
}
