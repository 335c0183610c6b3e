// Peak arithmetic of one ISA level: the accumulators of the matrix micro-kernel without its loads and stores.
#include "transfuse/peak.h"

#include <time.h>

#include "transfuse/gemm_tile.h"

namespace transfuse {
namespace TRANSFUSE_ISA {

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Repeats `step` on independent accumulators held in registers; `flops` per step.
template <class Step>
static double measure(double seconds, double flops, const Step& step) {
  constexpr int kAccumulators = 3 * kTileRows;
  VecF acc[kAccumulators];
  volatile float first = 1.5f;  // read at run time: a known start would let the compiler fold the loop away
  for (auto& v : acc) v = splat<float>(first);
  const double start = now();
  double elapsed, operations = 0;
  do {
    for (int i = 0; i < 20000; ++i) {
#pragma GCC unroll 24
      for (int j = 0; j < kAccumulators; ++j) acc[j] = step(acc[j]);
    }
    operations += 20000.0 * kAccumulators * flops;
    elapsed = now() - start;
  } while (elapsed < seconds);
  volatile float sink = 0;
  for (auto& v : acc) sink = sink + v[0];
  return operations / elapsed;
}

static double fma_float(double seconds) {
  // The accumulator is a factor: a product of constants would be computed once, outside the loop.
  const VecF a = splat<float>(0.999f), b = splat<float>(0.001f);
  return measure(seconds, 2.0 * Simd<float>::W, [a, b](VecF x) { return x * a + b; });
}

static double dot_bf16(double seconds) {
#if TRANSFUSE_BF16_DOT && defined(__AVX512BF16__)
  const VecU half = VecU{} + 0x3f003f00u;  // two bf16 of 0.5
  return measure(seconds, 4.0 * Simd<float>::W, [half](VecF x) { return DotBf16::dot(x, half, half); });
#else
  (void)seconds;
  return 0.0;
#endif
}

extern const PeakKernels kPeak;
const PeakKernels kPeak = {fma_float, dot_bf16};

}  // namespace TRANSFUSE_ISA
}  // namespace transfuse
