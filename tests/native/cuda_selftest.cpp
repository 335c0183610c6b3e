// Self-test of the CUDA kernels without a GPU: csrc/cuda compiled as C++ against tests/native/cuda_emulation, every
// thread of every block run on the CPU. It shows arithmetic, indexing, barriers and what is read and written; not
// speed, and nothing of the hardware.
#include <cstdio>

#include "check.h"
#include "cuda_adain_selftest.h"
#include "cuda_attention_selftest.h"
#include "cuda_head_curvature_selftest.h"
#include "cuda_mix_selftest.h"
#include "cuda_multitensor_selftest.h"
#include "cuda_saliency_selftest.h"
#include "cuda_token_merging_selftest.h"

int main() {
  selftest::adain_cuda_selftest();
  selftest::attention_cuda_selftest();
  selftest::mix_cuda_selftest();
  selftest::head_curvature_cuda_selftest();
  selftest::multitensor_cuda_selftest();
  selftest::saliency_cuda_selftest();
  selftest::token_merging_cuda_selftest();
  const selftest::Tally& t = selftest::tally();
  std::printf("transfuse_cuda_selftest: %ld passed, %ld failed\n", t.passed, t.failed);
  return t.failed == 0 && t.passed > 0 ? 0 : 1;
}
