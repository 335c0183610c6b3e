// Noise that is never stored: standard normal numbers from a counter, for antithetic gradient estimates (NES).
//
// Number e of sample i under a seed is defined by Philox 4x32-10 with counter (block, i), both 64 bits, key = seed.
// Numbers come in groups of 64: group q has the 16 blocks 16 q + j, and word c of block j belongs to number
// 64 q + 16 c + j. Words (r0, r1) and (r2, r3) of a block give two numbers each (Box and Muller):
//   radius = sqrt(-2 ln((r0 + 1/2) 2^-32)),  angle = 2 pi r1 2^-32,  radius cos(angle), radius sin(angle).
// So the same noise comes out on every machine, whatever its vectors, up to rounding.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

struct NesArgs {
  DType dtype = DType::f32;       // of x and of the perturbed batch
  int64_t count = 0;              // numbers of x
  const void* x = nullptr;        // contiguous
  const uint8_t* mask = nullptr;  // contiguous; noise is 0 where the mask is; nullptr: everywhere
  uint64_t seed = 0;
  int64_t start = 0, samples = 0;  // samples start, ..., start + samples - 1
  double sigma = 0.0;
  void* out = nullptr;              // perturb: (2 samples, count), first x + sigma noise, then x - sigma noise
  const double* weights = nullptr;  // gradient: one per sample
  void* sum = nullptr;              // gradient: (count), float, double for f64
};

struct NesKernels {
  void (*perturb)(const NesArgs&, const Parallel&);
  void (*gradient)(const NesArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const NesKernels& nes_kernels();

}  // namespace transfuse
