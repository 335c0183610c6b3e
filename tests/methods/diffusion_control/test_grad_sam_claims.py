"""The small claim of Grad-SAM, with a known answer: masks find where the subject's attention is.

A 16 x 16 grid, 2 heads, 5 tokens; attention to the subject is high inside a disc; the output is a
3 x 3 convolution of SiLU(feature + projected attention output).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transfuse.methods.diffusion_control.grad_sam import (
    attention_jacobian_scores,
    column_scores,
    make_mask,
)

SIDE, HEADS, TOKENS, WIDTH, CHANNELS, SUBJECT = 16, 2, 5, 8, 4, 2


def problem(seed):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    ys, xs = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centre = 5 + 6 * torch.rand(2, generator=g)
    disc = (ys - centre[0]) ** 2 + (xs - centre[1]) ** 2 <= 4.0**2
    logits = 0.5 * normal(HEADS, SIDE * SIDE, TOKENS)
    logits[..., SUBJECT] += torch.where(disc.flatten(), 3.0, -3.0)
    feature, value = normal(WIDTH, SIDE, SIDE), normal(HEADS, TOKENS, WIDTH)
    project = normal(WIDTH, HEADS * WIDTH) / (HEADS * WIDTH) ** 0.5
    kernel = normal(CHANNELS, WIDTH, 3, 3) / (9 * WIDTH) ** 0.5

    def fn(attention):
        out = (attention @ value).transpose(0, 1).flatten(1) @ project.T
        hidden = F.silu(feature + out.T.unflatten(1, (SIDE, SIDE)))
        return F.conv2d(hidden[None], kernel, padding=1)[0]

    return fn, logits.softmax(-1), disc


def overlap(scores, disc, rule):
    mask = make_mask(scores[None], rule=rule)
    both, either = (mask & disc).sum((1, 2)), (mask | disc).sum((1, 2))
    return (both / either).mean().item()


def other_rows(fn, attention, kind, seed=0):
    """Scores as they come out wrong: signed, or from random normal rows eight at a time."""
    delta = torch.zeros(HEADS, SIDE * SIDE, 1, requires_grad=True)
    index = torch.tensor([SUBJECT])
    output = fn(attention.index_add(2, index, delta)).flatten()
    g = torch.Generator().manual_seed(seed)
    scores = []
    for start in range(0, output.numel(), 8):
        rows = torch.eye(output.numel())[start : start + 8]
        if kind == "random":
            rows[:, start : start + 8] = torch.randn(8, 8, generator=g)
        (gradient,) = torch.autograd.grad(
            output, delta, rows, is_grads_batched=True, retain_graph=True
        )
        weights = attention[..., index]
        if kind == "signed":
            scores.append((weights * gradient).sum((1, 2, 3)))
        else:
            scores.append(column_scores(weights, gradient)[:, 0])
    return torch.cat(scores).view(1, CHANNELS, SIDE, SIDE)


@pytest.mark.claim
def test_exact_rectified_rows_find_the_subject_and_others_do_not():
    found = {"abs": [], "relu": [], "signed": [], "random": []}
    for seed in range(6):
        fn, attention, disc = problem(seed)
        for phi in ("abs", "relu"):
            scores = attention_jacobian_scores(fn, attention, [SUBJECT], phi=phi, chunk=128)
            found[phi].append(overlap(scores, disc, "official"))
        for kind in ("signed", "random"):
            found[kind].append(overlap(other_rows(fn, attention, kind), disc, "official"))
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    assert mean["abs"] >= 0.7, mean
    assert mean["relu"] >= 0.7, mean
    assert mean["signed"] < 0.55, mean
    assert mean["random"] < 0.55, mean


def test_the_picture_is_drawn_and_its_masks_hold_the_subject(tmp_path):
    pytest.importorskip("matplotlib")
    gallery = pytest.importorskip("transfuse.bench.gallery.grad_sam", exc_type=ImportError)
    path = tmp_path / "grad_sam.png"
    try:
        scene = gallery.scene((16, 24))
    except gallery.Unavailable as reason:
        pytest.skip(str(reason))
    inside = (scene.attention[0, :, scene.subject] > 0.5).view(16, 24)
    mask = make_mask(gallery.scores(scene))
    assert mask[:, inside].float().mean() > 0.8
    assert mask[:, ~inside].float().mean() < 0.3
    assert gallery.main(["--out", str(path), "--size", "12", "18"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
