"""Fake kernels and autograd of the raw ops on lists of tensors, C++ and Triton: what
``torch.compile`` sees."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from transfuse import _triton_ops
from transfuse.ops import _multitensor_core as core
from transfuse.ops._multitensor_core import RAW, Static

_registered: set[str] = set()
_lincomb_vjp, _ = core.lincomb_rules(lambda: RAW)
_dots_vjp, _ = core.dots_rules(lambda: RAW)


def _new(like):
    return like.new_empty(like.shape)


def _fake_lincomb(base, deltas, coefficients, ids, keys):
    return [_new(t) for t in (base if base else deltas[: coefficients.shape[1]])]


def _fake_dots(grads, deltas, ids, keys, partitions):
    shape = (len(deltas) // len(grads), len(grads), partitions)
    return grads[0].new_empty(shape, dtype=torch.float64)


def _fake_ratio(thetas, weights, coefficients, floors):
    blocks = thetas[: len(thetas) // coefficients.shape[1]]
    made = [_new(t) for _ in range(coefficients.shape[0]) for t in blocks]
    return made, coefficients.new_empty((), dtype=torch.int64)


def _fake_gram(tensors, lists, sizes):
    return tensors[0].new_empty((lists, lists), dtype=torch.float64)


def _fake_norms(tensors, scale, order):
    return tensors[0].new_empty((len(tensors),), dtype=torch.float64)


def _fake_norm(tensors, scale, order):
    return tensors[0].new_empty((), dtype=torch.float64)


def _fake_select(tensors, rank):
    return tensors[0].new_empty((), dtype=torch.float64)


def _fake_elect(base, deltas, thresholds, scale):
    return [_new(t) for t in (base if base else deltas[: len(deltas) // thresholds.shape[0]])]


def _nothing(*arguments):
    return None


def _setup_lincomb(ctx, inputs, output, backend: str) -> None:
    base, deltas, coefficients, ids, keys = inputs
    lists, blocks, partitions = coefficients.shape
    ctx.static = Static(lists, blocks, bool(base), bool(ids), tuple(keys), partitions, backend)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(coefficients, *base, *deltas, *ids)


def _lists(found, sizes):
    rows, at = [], 0
    for size in sizes:
        rows.append(list(found[at : at + size]))
        at += size
    return rows


def _backward_lincomb(ctx, grads):
    static, tensors = ctx.static, ctx.saved_tensors
    base, deltas, coefficients, _, _ = ctx.needs_input_grad
    sizes = (len(base), len(deltas), static.blocks if static.ids else 0)
    grads = [None] * static.blocks if grads is None else list(grads)
    needs = [coefficients, *base, *deltas, *[False] * sizes[2]]
    found = _lincomb_vjp(static, tensors, None, grads, needs)
    rows = _lists(found[1:], sizes)
    return rows[0], rows[1], found[0], rows[2], _of_numbers(static.keys)


def _setup_dots(ctx, inputs, output, backend: str) -> None:
    grads, deltas, ids, keys, partitions = inputs
    lists = len(deltas) // len(grads)
    ctx.static = Static(lists, len(grads), True, bool(ids), tuple(keys), partitions, backend)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads, *deltas, *ids)


def _backward_dots(ctx, cotangent):
    static, tensors = ctx.static, ctx.saved_tensors
    grads, deltas, _, _, _ = ctx.needs_input_grad
    sizes = (len(grads), len(deltas), static.blocks if static.ids else 0)
    needs = [*grads, *deltas, *[False] * sizes[2]]
    found = _dots_vjp(static, tensors, None, (cotangent,), needs)
    return (*_lists(found, sizes), _of_numbers(static.keys), None)


def _of_numbers(keys):
    """torch takes an empty list for one of tensors, whose gradient is a list."""
    return None if keys else []


_COMMON = {
    "lincomb": _fake_lincomb,
    "block_dots": _fake_dots,
    "multi_gram": _fake_gram,
    "select_magnitude": _fake_select,
    "elect_signs": _fake_elect,
}


def register() -> None:
    """Attach fakes and derivatives to the C++ ops; called once, after the library is loaded."""
    fakes = {
        "ratio_merge": _fake_ratio,
        "block_norms": _fake_norms,
        "sam_perturb_": _nothing,
        "copy_lists_": _nothing,
    }
    # The kernel of a C++ op is chosen by the device, not by the name of a backend.
    _attach(_COMMON | fakes, "", "cpu")


def register_triton() -> None:
    """Make the Triton kernels ops of torch, as the C++ ones are. Imports no Triton."""
    if _triton_ops.COMPILED in _registered:
        return
    for name, signature in {
        "lincomb": "(Tensor[] base, Tensor[] deltas, Tensor coefficients, Tensor[] ids, "
        "int[] keys) -> Tensor[]",
        "block_dots": "(Tensor[] grads, Tensor[] deltas, Tensor[] ids, int[] keys, "
        "int partitions) -> Tensor",
        "multi_norm": "(Tensor[] tensors, Tensor[] scale, int order) -> Tensor",
        "multi_gram": "(Tensor[] tensors, int lists, SymInt[] sizes) -> Tensor",
        "select_magnitude": "(Tensor[] tensors, SymInt rank) -> Tensor",
        "elect_signs": "(Tensor[] base, Tensor[] deltas, Tensor thresholds, "
        "float scale) -> Tensor[]",
    }.items():
        _triton_ops.define(core.TRITON[name], name, signature, recorded=False)
    _attach(_COMMON | {"multi_norm": _fake_norm}, "_triton", _triton_ops.COMPILED)


def _attach(fakes: dict[str, Callable], ending: str, backend: str) -> None:
    if backend in _registered:
        return
    _registered.add(backend)
    for name, fake in fakes.items():
        torch.library.register_fake(f"transfuse::{name}{ending}", fake)
    for name, backward, setup in (
        ("lincomb", _backward_lincomb, _setup_lincomb),
        ("block_dots", _backward_dots, _setup_dots),
    ):
        torch.library.register_autograd(
            f"transfuse::{name}{ending}",
            backward,
            setup_context=functools.partial(setup, backend=backend),
        )
