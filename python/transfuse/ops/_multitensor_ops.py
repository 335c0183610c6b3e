"""Fake kernels and autograd of the raw C++ ops on lists of tensors: what ``torch.compile`` sees."""

from __future__ import annotations

import torch

from transfuse.ops import _multitensor_core as core
from transfuse.ops._multitensor_core import RAW, Static

_registered = False
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


def _fake_select(tensors, rank):
    return tensors[0].new_empty((), dtype=torch.float64)


def _fake_elect(base, deltas, thresholds, scale):
    return [_new(t) for t in (base if base else deltas[: len(deltas) // thresholds.shape[0]])]


def _nothing(*arguments):
    return None


def _setup_lincomb(ctx, inputs, output) -> None:
    base, deltas, coefficients, ids, keys = inputs
    lists, blocks, partitions = coefficients.shape
    ctx.static = Static(
        lists, blocks, bool(base), bool(ids), tuple(keys), partitions, "cpu"
    )  # the kernel of a raw op is chosen by the device, not by the name of a backend
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


def _setup_dots(ctx, inputs, output) -> None:
    grads, deltas, ids, keys, partitions = inputs
    lists = len(deltas) // len(grads)
    ctx.static = Static(lists, len(grads), True, bool(ids), tuple(keys), partitions, "cpu")
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


def register() -> None:
    """Attach fakes and derivatives to the C++ ops; called once, after the library is loaded."""
    global _registered
    if _registered:
        return
    _registered = True
    fakes = {
        "lincomb": _fake_lincomb,
        "block_dots": _fake_dots,
        "ratio_merge": _fake_ratio,
        "multi_gram": _fake_gram,
        "block_norms": _fake_norms,
        "select_magnitude": _fake_select,
        "elect_signs": _fake_elect,
        "sam_perturb_": _nothing,
        "copy_lists_": _nothing,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"transfuse::{name}", fake)
    torch.library.register_autograd(
        "transfuse::lincomb", _backward_lincomb, setup_context=_setup_lincomb
    )
    torch.library.register_autograd(
        "transfuse::block_dots", _backward_dots, setup_context=_setup_dots
    )
