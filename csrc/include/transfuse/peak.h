// The arithmetic floor of this machine at the ISA level in use: what a benchmark divides by.
#pragma once

namespace transfuse {

struct PeakKernels {
  // Runs independent multiply-adds in registers for about `seconds` on the calling thread; returns FLOP/s.
  double (*fma_float)(double seconds);
  // The same with the bf16 dot product; 0 where the level has none in hardware.
  double (*dot_bf16)(double seconds);
};

const PeakKernels& peak_kernels();

}  // namespace transfuse
