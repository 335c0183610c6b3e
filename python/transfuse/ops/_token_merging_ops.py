"""Fakes and autograd of the raw token merging ops, C++ and Triton: what ``torch.compile`` sees."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse.ops import _token_merging_core as core
from transfuse.ops._token_merging_core import Calls, Static
from transfuse.ops._token_merging_reference import accumulate

_registered: set[str] = set()
_RULES = core.rules(lambda: Calls(core.segments, core.gather))


def _fake_nearest(x, reference, mask, exclude_self):
    shape = x.shape[:2]
    return x.new_empty(shape, dtype=accumulate(x.dtype)), x.new_empty(shape, dtype=torch.int64)


def _fake_match(metric, destination, protect, merged):
    batch, tokens = metric.shape[:2]
    shapes = ((batch, tokens), (batch, tokens), (batch, tokens - merged + 1))
    return tuple(metric.new_empty(shape, dtype=torch.int64) for shape in shapes)


def _fake_segments(x, scale, rows, order, start, weighting):
    return x.new_empty((x.shape[0], start.shape[1] - 1, x.shape[2]))


def _fake_gather(y, scale, rows, order, start, weighting):
    return y.new_empty((y.shape[0], rows.shape[1], y.shape[2]))


def _fake_amax(x, rows, order, start, winners):
    shape = (x.shape[0], start.shape[1] - 1, x.shape[2])
    return x.new_empty(shape), x.new_empty(shape if winners else (0,), dtype=torch.int64)


def _fake_push(x, reference, similarity, index, alpha, threshold):
    return x.new_empty(x.shape)


# Op -> (its rule, its fake, number of tensor arguments, fields of Static the others are).
_OPS = {
    "nearest_tokens": ("nearest", _fake_nearest, 3, ("exclude_self",)),
    "merge_segments": ("segments", _fake_segments, 5, ("weighting",)),
    "merge_gather": ("gather", _fake_gather, 5, ("weighting",)),
    "merge_amax": ("amax", _fake_amax, 4, ("winners",)),
    "push_tokens": ("push", _fake_push, 4, ("alpha", "threshold")),
}
_PLAN = "Tensor? scale, Tensor rows, Tensor order, Tensor start, int weighting"
_SCHEMAS = {
    "nearest_tokens": "(Tensor x, Tensor reference, Tensor? mask, bool exclude_self) "
    "-> (Tensor, Tensor)",
    "merge_segments": f"(Tensor x, {_PLAN}) -> Tensor",
    "merge_gather": f"(Tensor y, {_PLAN}) -> Tensor",
    "merge_amax": "(Tensor x, Tensor rows, Tensor order, Tensor start, bool winners) "
    "-> (Tensor, Tensor)",
    "push_tokens": "(Tensor x, Tensor reference, Tensor similarity, Tensor index, float alpha, "
    "float threshold) -> Tensor",
}


def _differentiate(op: str, rule: str, count: int, fields: tuple[str, ...], backend: str) -> None:
    vjp, _ = _RULES[rule]

    def setup(ctx, inputs, output) -> None:
        options = dict(zip(fields, inputs[count:], strict=True))
        if not options.pop("winners", True):
            raise ValueError("merge_amax: expected winners=True where a gradient is needed")
        ctx.static = Static(backend, **options)
        ctx.set_materialize_grads(False)
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        ctx.save_for_backward(*inputs[:count], *outputs)

    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:count]
        found = vjp(ctx.static, saved[:count], saved[count:], grads, needs)
        return (*found, *([None] * len(fields)))

    torch.library.register_autograd(op, backward, setup_context=setup)


def register() -> None:
    """Attach fakes and autograd to the C++ ops; called once, after the library is loaded."""
    # The kernel of a C++ op is chosen by the device, not by the name of a backend.
    if _attach("", "cpu"):
        torch.library.register_fake("transfuse::match_tokens", _fake_match)


def register_triton() -> None:
    """Make the Triton kernels ops of torch, as the C++ ones are. Imports no Triton."""
    if _triton_ops.COMPILED in _registered:
        return
    for name, signature in _SCHEMAS.items():
        _triton_ops.define("token_merging", name, signature, recorded=True)
    _attach("_triton", _triton_ops.COMPILED)


def _attach(ending: str, backend: str) -> bool:
    """Whether there was something to attach: nothing is attached twice."""
    if backend in _registered:
        return False
    _registered.add(backend)
    for op, (rule, fake, count, fields) in _OPS.items():
        torch.library.register_fake(f"transfuse::{op}{ending}", fake)
        _differentiate(f"transfuse::{op}{ending}", rule, count, fields, backend)
    return True
