"""Which backend runs an op: one table, one rule, one explanation.

``backend=None`` takes the first default that serves the call; naming a backend takes that one or
raises, never another. A GPU kernel becomes a default only once a record of its proof is committed
(``bench/results``); until then it runs when named.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transfuse import _native

BACKENDS = ("reference", "cpu", "triton", "cuda")
_KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a stand-in without a spec
        return False


# Asked once: torch 2.10's compiler does not go into find_spec.
_TRITON_INSTALLED = _triton_installed()


# ``limit(*tensors)`` of a call: why a backend does not take tensors of these shapes, or None.
Limit = Callable[..., str | None]


@dataclass(frozen=True)
class OpBackends:
    """The backends an op has, the GPU ones among them that are proven (and so defaults), what
    limits a backend by the shapes of the first tensors of a call, and the dtypes that a backend
    takes where they are not the usual ones."""

    name: str
    backends: tuple[str, ...]
    proven: frozenset[str] = field(default_factory=frozenset)
    limits: Mapping[str, Limit] = field(default_factory=dict)
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)


_OPS: dict[str, OpBackends] = {}
_warned = False


def declare(
    name: str,
    backends: tuple[str, ...],
    proven: frozenset[str] = frozenset(),
    limits: Mapping[str, Limit] | None = None,
    dtypes: Mapping[str, tuple[torch.dtype, ...]] | None = None,
) -> None:
    """Enter an op in the table. Called once by the module that defines it."""
    if name in _OPS:
        raise ValueError(f"op {name!r} is declared twice")
    unknown = [b for b in backends if b not in BACKENDS]
    if unknown:
        raise ValueError(f"op {name!r}: unknown backends {unknown}, expected some of {BACKENDS}")
    _OPS[name] = OpBackends(
        name,
        backends,
        proven,
        {} if limits is None else limits,
        {} if dtypes is None else dtypes,
    )


def declared() -> dict[str, OpBackends]:
    """All ops declared so far, by name."""
    return dict(_OPS)


def why_not(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    tensors: Sequence[Tensor] = (),
) -> str | None:
    """The reason a backend cannot serve this op on this device and dtype; None if it can.

    ``tensors``: the first of the call, for backends that are limited in their shapes.
    """
    if backend not in _OPS[op].backends:
        return f"{op} has no {backend} kernel"
    if backend == "reference":
        return None
    supported = _OPS[op].dtypes.get(backend, _KERNEL_DTYPES.get(backend))
    if supported is not None and dtype not in supported:
        names = ", ".join(str(d).removeprefix("torch.") for d in supported)
        return f"dtype {str(dtype).removeprefix('torch.')} is not one of {names}"
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device}, the cpu backend needs them on the CPU"
        state = _native.status()
        return None if state.loaded else state.reason
    if backend == "triton":
        if not _TRITON_INSTALLED:
            return "triton is not installed; install the extra transfuse[triton]"
        if device.type != "cuda" and not _interpreting():
            return f"the tensors are on {device}, Triton kernels need a CUDA device"
        return _limit(op, backend, tensors)
    if device.type != "cuda":
        return f"the tensors are on {device}, the cuda backend needs a CUDA device"
    state = _native.cuda_status()
    if not state.loaded:
        return f"the CUDA library is not loaded: {state.reason}"
    return _limit(op, backend, tensors)


def _limit(op: str, backend: str, tensors: Sequence[Tensor]) -> str | None:
    limit = _OPS[op].limits.get(backend)
    return None if limit is None or not tensors else limit(*tensors)


def choose(
    op: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    tensors: Sequence[Tensor] = (),
) -> str:
    """The backend that runs ``op``; ``"composed"`` where only eager torch serves by default.

    ``tensors``: as for :func:`why_not`.

    Raises:
        ValueError: an unknown backend name.
        RuntimeError: a named backend that cannot serve the call, with the reason.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {BACKENDS} or None, got {backend!r}")
        reason = why_not(op, backend, device, dtype, tensors)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
        return backend
    for candidate in _defaults(op, device):
        if why_not(op, candidate, device, dtype, tensors) is None:
            return candidate
    if device.type == "cpu" and not _native.status().loaded:
        _warn_once()
    return "composed"


def explain(op: str | Callable, *tensors: Tensor, backend: str | None = None) -> str:
    """Says which backend an op would run on the given tensors, and why the others do not.

    Args:
        op: the op or its name (``"attend"``).
        tensors: at least one tensor of the call; device and dtype are taken from the first, and
            limits of shapes from as many as are given.
        backend: as given to the op.

    Returns:
        A few lines of text.

    Example:
        >>> import torch, transfuse
        >>> print(transfuse.explain("attend", torch.zeros(1, 1, 2, 8), backend="reference"))
        attend on cpu, float32: reference (asked for)
    """
    import transfuse.ops  # noqa: F401  (declares the ops)

    name = op if isinstance(op, str) else op.__name__
    if name not in _OPS:
        raise ValueError(f"op: expected one of {sorted(_OPS)}, got {name!r}")
    if not tensors or not isinstance(tensors[0], Tensor):
        raise TypeError("tensors: expected at least one tensor of the call")
    device, dtype = tensors[0].device, tensors[0].dtype
    chosen = choose(name, backend, device, dtype, tensors)
    how = "asked for" if backend is not None else "default"
    if chosen == "composed":
        how = "default: eager torch, with scaled_dot_product_attention where it fits"
    lines = [f"{name} on {device.type}, {str(dtype).removeprefix('torch.')}: {chosen} ({how})"]
    if backend is not None:
        return lines[0]
    for other in _OPS[name].backends:
        if other == chosen:
            continue
        reason = why_not(name, other, device, dtype, tensors)
        if reason is None and other == "reference":
            reason = "runs when named: the specification, not meant to be fast"
        elif reason is None:
            reason = "runs when named: not proven on a GPU yet, no record in bench/results"
        lines.append(f"  {other}: {reason}")
    return "\n".join(lines)


def _defaults(op: str, device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return ("cpu",)
    return tuple(b for b in ("cuda", "triton") if b in _OPS[op].proven)


def _interpreting() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


def _warn_once() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"transfuse runs without its CPU kernels: {_native.status().reason}", stacklevel=4
        )
