// Self-test of the torch-free kernels, one header per op. Built alone, also under sanitizers (see CMakeLists.txt):
//   transfuse_selftest [--cases N]   run at the level of this processor, or at the one TRANSFUSE_CPU_ISA names
//   transfuse_selftest --levels      the levels that this processor runs, one per line
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "attention_selftest.h"
#include "check.h"
#include "head_curvature_selftest.h"
#include "kernel_sums_selftest.h"
#include "mix_selftest.h"
#include "multitensor_selftest.h"
#include "nes_selftest.h"
#include "patch_gram_selftest.h"
#include "row_codes_selftest.h"
#include "saliency_selftest.h"
#include "simplex_selftest.h"
#include "token_merging_selftest.h"
#include "transfuse/isa.h"
#include "window_selftest.h"

namespace {

int run(int argc, char** argv) {
  int cases = 40;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--levels") == 0) {
      for (const auto& level : transfuse::isa_levels())
        if (level.supported) std::printf("%s\n", level.name);
      return 0;
    }
    if (std::strcmp(argv[i], "--cases") == 0 && i + 1 < argc) {
      cases = std::atoi(argv[++i]);
      continue;
    }
    std::fprintf(stderr, "usage: transfuse_selftest [--cases N] | --levels\n");
    return 2;
  }
  std::printf("transfuse_selftest at %s\n", transfuse::isa_name(transfuse::isa_in_use()));
  selftest::attention_selftest(cases);
  selftest::window_selftest(4 * cases);
  selftest::head_curvature_selftest();
  selftest::kernel_sums_selftest(cases);
  selftest::mix_selftest(cases);
  selftest::multitensor_selftest();
  selftest::nes_selftest();
  selftest::patch_gram_selftest(cases);
  selftest::row_codes_selftest(cases);
  selftest::saliency_selftest(cases);
  selftest::simplex_selftest();
  selftest::token_merging_selftest(cases);
  const selftest::Tally& t = selftest::tally();
  std::printf("%ld passed, %ld failed\n", t.passed, t.failed);
  return t.failed == 0 && t.passed > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
