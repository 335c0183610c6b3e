#include "transfuse/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "transfuse/adain.h"
#include "transfuse/attention.h"
#include "transfuse/head_curvature.h"
#include "transfuse/kernel_sums.h"
#include "transfuse/mix.h"
#include "transfuse/multitensor.h"
#include "transfuse/nes.h"
#include "transfuse/patch_gram.h"
#include "transfuse/peak.h"
#include "transfuse/row_codes.h"
#include "transfuse/saliency.h"
#include "transfuse/simplex.h"
#include "transfuse/token_merging.h"

namespace transfuse {

namespace {

bool processor_supports(Isa isa) {
  switch (isa) {
    case Isa::portable:
    case Isa::emulated512: return true;
#if TRANSFUSE_X86_LEVELS
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if TRANSFUSE_AVX512_LEVELS
    case Isa::avx512:
      return processor_supports(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::avx512_bf16: return processor_supports(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
    default: return false;
  }
}

std::vector<IsaLevel> find_levels() {
#if TRANSFUSE_X86_LEVELS
  __builtin_cpu_init();
  constexpr bool avx2 = true, avx512 = TRANSFUSE_AVX512_LEVELS;
#else
  constexpr bool avx2 = false, avx512 = false;
#endif
  std::vector<IsaLevel> levels;
  const Isa all[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::emulated512};
  for (const Isa isa : all) {
    const bool compiled = isa == Isa::avx2 ? avx2 : isa == Isa::avx512 || isa == Isa::avx512_bf16 ? avx512 : true;
    levels.push_back({isa, isa_name(isa), compiled, compiled && processor_supports(isa)});
  }
  return levels;
}

Isa choose() {
  const char* forced = std::getenv("TRANSFUSE_CPU_ISA");
  Isa best = Isa::portable;
  std::string usable;
  for (const IsaLevel& level : isa_levels()) {
    if (!level.supported) continue;
    usable += usable.empty() ? level.name : std::string(", ") + level.name;
    if (forced != nullptr && std::string(forced) == level.name) return level.isa;
    if (level.isa != Isa::emulated512) best = level.isa;
  }
  if (forced != nullptr && forced[0] != '\0') {
    throw std::runtime_error("TRANSFUSE_CPU_ISA=" + std::string(forced) +
                             " cannot run here: this build and processor offer " + usable);
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::emulated512: return "emulated512";
  }
  return "unknown";
}

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = find_levels();
  return levels;
}

Isa isa_in_use() {
  static const Isa isa = choose();
  return isa;
}

TRANSFUSE_KERNEL_TABLE(AdainKernels, kAdain, adain_kernels)
TRANSFUSE_BF16_KERNEL_TABLE(AttentionKernels, kAttention, attention_kernels)
TRANSFUSE_KERNEL_TABLE(HeadKernels, kHead, head_kernels)
TRANSFUSE_KERNEL_TABLE(KernelSumsKernels, kKernelSums, kernel_sums_kernels)
TRANSFUSE_KERNEL_TABLE(MixKernels, kMix, mix_kernels)
TRANSFUSE_KERNEL_TABLE(MultitensorKernels, kMultitensor, multitensor_kernels)
TRANSFUSE_KERNEL_TABLE(MultitensorSumKernels, kMultitensorSums, multitensor_sum_kernels)
TRANSFUSE_KERNEL_TABLE(NesKernels, kNes, nes_kernels)
TRANSFUSE_KERNEL_TABLE(PatchGramKernels, kPatchGram, patch_gram_kernels)
TRANSFUSE_BF16_KERNEL_TABLE(PeakKernels, kPeak, peak_kernels)
TRANSFUSE_KERNEL_TABLE(RowCodesKernels, kRowCodes, row_codes_kernels)
TRANSFUSE_KERNEL_TABLE(SaliencyKernels, kSaliency, saliency_kernels)
TRANSFUSE_KERNEL_TABLE(SimplexKernels, kSimplex, simplex_kernels)
TRANSFUSE_BF16_KERNEL_TABLE(TokenMergingKernels, kTokenMerging, token_merging_kernels)

}  // namespace transfuse
