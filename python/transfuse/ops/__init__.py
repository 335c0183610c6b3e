"""The ops: fused kernels behind thin wrappers. Every public name is listed here."""

from transfuse.ops.adain import adain
from transfuse.ops.attention import (
    KV,
    AttendResult,
    Blend,
    attend,
    attend_with_lse,
    merge_attention,
)
from transfuse.ops.cfg_step import (
    DDIM,
    DDPM,
    CFGCosines,
    CFGOriginal,
    Euler,
    Predict,
    cfg_step,
    cfg_step_with_cosine,
    cfg_step_with_original,
)
from transfuse.ops.eigen import EigenPairs, Lanczos, lanczos, lanczos_eigenpairs, power_iteration
from transfuse.ops.finish_map import finish_map
from transfuse.ops.ggn_operator import GGNOperator
from transfuse.ops.grad_weighted_map import grad_weighted_map
from transfuse.ops.gradient_weights import (
    aligned_mtl_weights,
    cagrad_weights,
    nash_weights,
    pcgrad_weights,
    upgrad_weights,
)
from transfuse.ops.head_curvature import (
    head_gradient,
    head_hessian_diagonal,
    head_hessian_product,
    head_hessian_trace,
    head_hgp,
)
from transfuse.ops.head_hessian_distance import head_hessian_distance
from transfuse.ops.head_hutchinson_diagonal import head_hutchinson_diagonal
from transfuse.ops.hessian_operator import HessianOperator
from transfuse.ops.kernel_alignment import cka, hsic
from transfuse.ops.kernel_divergences import conditional_cs, cs_divergence, cs_qmi, mmd2
from transfuse.ops.kernel_sums import KernelFactor, kernel_product_sums, kernel_sums
from transfuse.ops.lora import lora_conv2d, lora_linear
from transfuse.ops.low_rank_trace import hutchpp_trace, xtrace
from transfuse.ops.median_bandwidth import median_bandwidth
from transfuse.ops.multitensor import lincomb, multi_dot, multi_gram, multi_norm
from transfuse.ops.nes import nes_gradient, nes_perturb
from transfuse.ops.noise_mix import NoisyVelocity, noise_mix, noise_mix_with_velocity
from transfuse.ops.normgrad_map import normgrad_map
from transfuse.ops.patch_gram import patch_gram
from transfuse.ops.ratio_merge import ratio_merge
from transfuse.ops.row_codes import RowCodes, RowGroups, row_codes, row_groups
from transfuse.ops.sharpness import Perturbation, sam_perturb_, sam_restore_
from transfuse.ops.simplex import (
    NonnegativeSolution,
    ParetoSolution,
    min_norm_simplex,
    nonneg_qp,
    pareto_lp,
)
from transfuse.ops.spectral_density import SpectralDensity, spectral_density
from transfuse.ops.ties import ties_merge, trim_largest
from transfuse.ops.token_merging import (
    MergePlan,
    Nearest,
    compose_plans,
    match_tokens,
    merge_tokens,
    nearest_tokens,
    push_tokens,
    unmerge_tokens,
)
from transfuse.ops.trace_estimators import (
    DiagonalEstimate,
    Estimate,
    hutchinson_diagonal,
    hutchinson_trace,
)
from transfuse.ops.window_attention import window_attention, window_partition, window_reverse

__all__ = [
    "DDIM",
    "DDPM",
    "KV",
    "AttendResult",
    "Blend",
    "CFGCosines",
    "CFGOriginal",
    "DiagonalEstimate",
    "EigenPairs",
    "Estimate",
    "Euler",
    "GGNOperator",
    "HessianOperator",
    "KernelFactor",
    "Lanczos",
    "MergePlan",
    "Nearest",
    "NoisyVelocity",
    "NonnegativeSolution",
    "ParetoSolution",
    "Perturbation",
    "Predict",
    "RowCodes",
    "RowGroups",
    "SpectralDensity",
    "adain",
    "aligned_mtl_weights",
    "attend",
    "attend_with_lse",
    "cagrad_weights",
    "cfg_step",
    "cfg_step_with_cosine",
    "cfg_step_with_original",
    "cka",
    "compose_plans",
    "conditional_cs",
    "cs_divergence",
    "cs_qmi",
    "finish_map",
    "grad_weighted_map",
    "head_gradient",
    "head_hessian_diagonal",
    "head_hessian_distance",
    "head_hessian_product",
    "head_hessian_trace",
    "head_hgp",
    "head_hutchinson_diagonal",
    "hsic",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "kernel_product_sums",
    "kernel_sums",
    "lanczos",
    "lanczos_eigenpairs",
    "lincomb",
    "lora_conv2d",
    "lora_linear",
    "match_tokens",
    "median_bandwidth",
    "merge_attention",
    "merge_tokens",
    "min_norm_simplex",
    "mmd2",
    "multi_dot",
    "multi_gram",
    "multi_norm",
    "nash_weights",
    "nearest_tokens",
    "nes_gradient",
    "nes_perturb",
    "noise_mix",
    "noise_mix_with_velocity",
    "nonneg_qp",
    "normgrad_map",
    "pareto_lp",
    "patch_gram",
    "pcgrad_weights",
    "power_iteration",
    "push_tokens",
    "ratio_merge",
    "row_codes",
    "row_groups",
    "sam_perturb_",
    "sam_restore_",
    "spectral_density",
    "ties_merge",
    "trim_largest",
    "unmerge_tokens",
    "upgrad_weights",
    "window_attention",
    "window_partition",
    "window_reverse",
    "xtrace",
]
