"""What the passes of the attention backward share; the formulas are in ``attention_backward``."""

from typing import Any, NamedTuple

from ._triton import tl, triton


class Saved(NamedTuple):
    """What the passes read per query; ``delta`` and ``rho`` are left by the query pass."""

    query: Any
    query_tangent: Any
    grad_out: Any
    grad_lse: Any
    out: Any
    lse: Any
    out_tangent: Any
    lse_tangent: Any
    delta: Any
    rho: Any


@triton.jit
def logit_gradients(p, w, t, z, delta, mu, rho, TANGENT: tl.constexpr):
    """(dS, X, U) of ``attention_backward``; without tangents X = dS and U = P."""
    ds = p * (w - delta)
    if TANGENT:
        x = p * (t * (w - delta) - mu * w + z - rho)
        u = p * (t - mu)
    else:
        x = ds
        u = p
    return ds, x, u
