"""Grad-SAM: official outputs, exact Jacobian rows, the patch against dense maps, and refusals."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transfuse.methods._attention_columns import attention_columns
from transfuse.methods._attention_layers import select_attention
from transfuse.methods.diffusion_control.easy_ref import EasyRef, EasyRefOptions
from transfuse.methods.diffusion_control.grad_sam import (
    GradSAM,
    GradSAMOptions,
    attention_jacobian_scores,
    blend_latents,
    column_scores,
    keep_subjects,
    make_mask,
    subject_tokens,
)
from transfuse.methods.diffusion_control.style_injection import StyleInjector
from transfuse.ops import KV, attend_with_lse
from transfuse.testing import golden

GOLDEN = golden.load("grad_sam")


# --- against the official implementation ---------------------------------------------------------


def test_scores_match_the_official_code():
    x = GOLDEN.inputs("score")
    index = x["token_idx"]
    out = column_scores(x["attn"][..., index], x["grad"][..., index], phi="relu")
    GOLDEN.check(out, "score", "score")
    other = column_scores(x["attn"][..., index], x["grad"][..., index])
    assert not torch.allclose(other, out, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_and_blend_match_the_official_code(dtype):
    x = GOLDEN.inputs("mask", dtype)
    mask = make_mask(x["scores"], rule="official")
    GOLDEN.check(mask[None].float(), "mask", "mask")
    masks = torch.stack([make_mask(layer[None], rule="official") for layer in x["scores"]])
    GOLDEN.check(masks.float(), "masks", "mask")
    GOLDEN.check(blend_latents(x["latents"], x["ref_latents"], mask), "latents", "mask")
    simple = make_mask(x["scores"], rule="mean")
    GOLDEN.check(simple[None].float(), "simple_mask_l0s0", "mask")
    blended = blend_latents(x["latents"], x["ref_latents"], simple)
    GOLDEN.check(blended, "simple_latents", "mask")


# --- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "bool", "bias", "row"])
def test_columns_are_those_of_the_map(kind, dtype):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=g).to(dtype)
    k, v = torch.randn(2, 2, 2, 7, 8, generator=g).to(dtype).unbind()
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.3
    mask = None
    if kind == "bool":
        mask = torch.rand(2, 1, 9, 7, generator=g) > 0.4
        mask[0, 0, 2] = False
        logits = logits.masked_fill(~mask, -math.inf)
    elif kind != "none":
        shape = (1, 4, 9, 7) if kind == "bias" else (2, 1, 9, 1)
        mask = torch.randn(*shape, generator=g).to(dtype)
        logits = logits + mask.double()
    source = KV(k, v, bias=mask) if kind in ("bias", "row") else KV(k, v, mask=mask)
    lse = attend_with_lse(q, source, scale=0.3).lse
    columns = torch.tensor([6, 0, 6])
    out = attention_columns(q, k, columns, lse, scale=0.3, mask=mask)
    expected = logits.softmax(-1).nan_to_num(0.0)[..., columns]
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # lse and logits are of the rounded inputs in float32 at least, whatever the dtype.
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **({} if kwargs is None else kwargs))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_no_map_is_formed():
    q, k = torch.randn(1, 2, 400, 8), torch.randn(1, 2, 600, 8)
    with Largest() as seen:
        lse = attend_with_lse(q, KV(k, k)).lse
        attention_columns(q, k, torch.tensor([3, 5]), lse)
    assert seen.elements <= 2 * 600 * 8, "inputs are the largest, the map would be 480000"


def test_columns_refuse():
    q, k, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 3)
    one = torch.tensor([0])
    for arguments, match in (
        ((q, k, torch.tensor([5]), lse), r"columns: expected entries in \[0, 5\), got 5"),
        ((q, k, one, lse[:, :1]), "lse: expected"),
        ((q, k[..., :3], one, lse), "key: expected a head count that divides 2 and width 4"),
        ((q, k[:, :0], one, lse), "key: expected a head count"),
    ):
        with pytest.raises(ValueError, match=match):
            attention_columns(*arguments)


# --- exact Jacobians of a function ---------------------------------------------------------------


class Toy(nn.Module):
    """Weights (H, N, L) -> (C, h, w), not linear, with a normalisation across positions."""

    def __init__(self, heads=2, tokens=5, width=3, grid=(3, 4)):
        super().__init__()
        self.grid = grid
        self.value = nn.Parameter(torch.randn(heads, tokens, width))
        self.mix = nn.Conv2d(heads * width, 2, 3, padding=1)
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, a):
        out = (a @ self.value).transpose(0, 1).flatten(1).T.unflatten(1, self.grid)
        return self.norm(self.mix(torch.nn.functional.silu(out)[None]))[0]


@pytest.mark.parametrize("phi", ["abs", "relu"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_scores_equal_the_full_jacobian(phi, mode, chunk):
    fn = Toy().double()
    a = torch.randn(2, 12, 5, dtype=torch.float64).softmax(-1)
    jacobian = torch.autograd.functional.jacobian(fn, a)  # (C, h, w, H, N, L)
    rectified = jacobian.abs() if phi == "abs" else jacobian.clamp_min(0)
    per_column = (a * rectified).sum((-3, -2))
    out = attention_jacobian_scores(fn, a, [1, [0, 3], [1, 4]], phi=phi, mode=mode, chunk=chunk)
    expected = torch.stack([per_column[..., list(s)].sum(-1) for s in ((1,), (0, 3), (1, 4))])
    torch.testing.assert_close(out, expected)
    assert not out.requires_grad


def test_only_the_columns_asked_for_are_in_the_graph():
    seen = []

    def fn(a):
        seen.append(a)
        return a.sum((0, 1))

    a = torch.rand(2, 6, 77)
    out = attention_jacobian_scores(fn, a, [3])
    assert out.shape == (1, 77)
    assert out[0, 3] == pytest.approx(a[..., 3].sum().item())
    assert out[0, :3].abs().max() == 0
    graph, leaves = [seen[0].grad_fn], []
    while graph:
        node = graph.pop()
        leaves += [tuple(node.variable.shape)] if hasattr(node, "variable") else []
        graph += [parent for parent, _ in node.next_functions if parent is not None]
    assert leaves == [(1, 2, 6, 1)]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"subjects": []}, ValueError, "subjects: expected at least one"),
        ({"subjects": 2}, ValueError, "subjects"),
        ({"subjects": [[]]}, ValueError, r"subjects\[0\]: expected at least one"),
        ({"subjects": [5]}, ValueError, "below the 5 tokens of the context, got 5"),
        ({"subjects": [-1]}, ValueError, "positions from 0"),
        ({"subjects": [[1, "a"]]}, TypeError, r"subjects\[0\]: expected integers"),
        ({"phi": "square"}, ValueError, "phi: expected one of abs, relu"),
        ({"mode": "both"}, ValueError, "mode: expected reverse or forward"),
        ({"chunk": 0}, ValueError, "chunk"),
    ],
)
def test_function_refuses(change, error, match):
    arguments = {"subjects": [1], **change}
    with pytest.raises(error, match=match):
        attention_jacobian_scores(lambda a: a, torch.rand(2, 3, 5), **arguments)


# --- subjects ------------------------------------------------------------------------------------


class Tokenizer:
    """Splits long words in two, marks nothing by spaces, puts 0 before and 1 after."""

    def __init__(self):
        self.table = {}

    def __call__(self, text, add_special_tokens=True):
        pieces = [p for w in text.split() for p in ([w[:3], "##" + w[3:]] if len(w) > 4 else [w])]
        ids = [self.table.setdefault(piece, len(self.table) + 2) for piece in pieces]
        return {"input_ids": [0, *ids, 1] if add_special_tokens else ids}


def test_words_become_positions_of_the_text_encoder():
    tokenizer = Tokenizer()
    found = subject_tokens(tokenizer, "a brown cat on a mattress", ["cat", "mattress", "brown cat"])
    assert found == [[4], [7, 8], [2, 3, 4]]
    with pytest.raises(ValueError, match="tokens of 'dog' do not occur"):
        subject_tokens(tokenizer, "a cat", ["dog"])


# --- masks ---------------------------------------------------------------------------------------


def test_paper_rule_is_gaussian_then_maximum_then_threshold():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, 2, 6, 7, generator=g, dtype=torch.float64)
    line = torch.tensor([math.exp(-0.5 / 4.0), 1.0, math.exp(-0.5 / 4.0)], dtype=torch.float64)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = torch.nn.functional.pad(scores, (1, 1, 1, 1))
    smooth = sum(
        kernel[i, j] * padded[..., i : i + 6, j : j + 7] for i in range(3) for j in range(3)
    )
    low = torch.nn.functional.pad(smooth, (1, 1, 1, 1), value=-math.inf)
    widest = torch.stack([low[..., i : i + 6, j : j + 7] for i in range(3) for j in range(3)]).amax(
        0
    )
    threshold = widest.mean((-2, -1), keepdim=True) + 0.5 * widest.std((-2, -1), keepdim=True)
    expected = (widest > threshold).any(1).all(0)
    out = make_mask(scores, sigma=2.0)
    assert torch.equal(out, expected)
    assert 0 < out.sum() < out.numel()
    batched = make_mask(torch.stack([scores, scores.flip(-1)]), sigma=2.0)
    assert torch.equal(batched, torch.stack([expected, expected.flip(-1)]))


def test_constant_scores_warn_and_give_an_empty_mask():
    for rule in ("official", "mean"):
        scores = torch.zeros(1, 1, 2, 4, 4)
        with pytest.warns(UserWarning, match="exceed no threshold"):
            assert not make_mask(scores, rule=rule).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_mask(torch.rand(1, 1, 2, 4, 4))


def test_masks_refuse():
    good = torch.rand(1, 1, 2, 4, 4)
    for scores, options, error, match in (
        (
            good,
            {"rule": "box"},
            ValueError,
            "rule: expected one of paper, official, mean, aggregated",
        ),
        (good, {"sigma": 0.0}, ValueError, "sigma"),
        (good, {"factor": math.nan}, ValueError, "factor"),
        (good[0], {}, ValueError, r"scores: expected \(..., layers"),
        (good[:0], {}, ValueError, "no empty dimension"),
        (good.long(), {}, TypeError, "scores"),
        (good * math.nan, {}, ValueError, "scores: expected finite values"),
    ):
        with pytest.raises(error, match=match):
            make_mask(scores, **options)


def test_blend_is_exact_where_it_chooses_and_linear_between():
    z, ref = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    hard = torch.rand(4, 5, 5) > 0.5
    poisoned = torch.where(hard, math.nan, ref)
    out = blend_latents(z, poisoned, hard.float())
    assert torch.equal(out, torch.where(hard, z, ref))
    assert torch.equal(out, blend_latents(z, poisoned, hard))
    soft = torch.rand(1, 1, 5, 5)
    torch.testing.assert_close(blend_latents(z, ref, soft), soft * z + (1 - soft) * ref)
    half = blend_latents(z.bfloat16(), ref.bfloat16(), soft)
    assert half.dtype == torch.bfloat16
    for mask, match in ((torch.full((5, 5), 1.5), "values in"), (torch.ones(4, 4), "mask")):
        with pytest.raises(ValueError, match=match):
            blend_latents(z, ref, mask)
    with pytest.raises(TypeError, match="reference"):
        blend_latents(z, ref.double(), hard)


# --- the patch -----------------------------------------------------------------------------------

SUBJECTS = [[1], [0, 3]]


def dense_scores(model, x, layer, subjects, phi="abs", text=None):
    """By hand: the map of one cross-attention layer as an input, its whole Jacobian."""
    text = model.empty if text is None else text

    def split(y, heads):
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    def run(leaf):
        h = model.inward(x.flatten(2).transpose(1, 2)) + 0.001
        kept = None
        for i, (block, cross) in enumerate(zip(model.blocks, model.cross, strict=True)):
            h = h + block(h)
            q, k, v = (
                split(y, cross.num_heads)
                for y in (cross.to_q(h), cross.to_k(text), cross.to_v(text))
            )
            p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            if i == layer:
                kept = p
                p = p if leaf is None else leaf
            h = h + cross.to_out((p @ v).transpose(1, 2).flatten(2))
        return model.outward(h).transpose(1, 2).unflatten(2, x.shape[-2:]), kept

    _, a = run(None)
    a = a.detach()
    jacobian = torch.autograd.functional.jacobian(lambda leaf: run(leaf)[0].sum(0), a)
    # Samples are independent: the gradient of the sum over samples holds each one's own.
    rectified = jacobian.abs() if phi == "abs" else jacobian.clamp_min(0)
    per_column = (a * rectified).sum((-3, -2))  # (C, h, w, B, L)
    parts = [per_column[..., list(s)].sum(-1) for s in subjects]
    return torch.stack(parts, -1).permute(3, 4, 0, 1, 2)


@pytest.mark.parametrize("phi", ["abs", "relu"])
@pytest.mark.parametrize("batch", [1, 2])
def test_patch_equals_dense_maps(text_denoiser, phi, batch):
    model, x = text_denoiser.double(), torch.randn(batch, 4, 3, 3, dtype=torch.float64)
    options = GradSAMOptions(phi=phi, chunk=5)
    with GradSAM(model, layers=[2, 7], options=options) as patch:
        assert patch.layers == ("cross.2", "cross.7")
        result = patch.score(lambda: model(x, 1), SUBJECTS)
    for i, layer in enumerate((2, 7)):
        expected = dense_scores(model, x, layer, SUBJECTS, phi)
        torch.testing.assert_close(result.scores[:, i], expected)
    torch.testing.assert_close(result.output, model(x, 1).detach())
    assert not result.scores.requires_grad


def test_last_layer_by_default_and_nothing_is_left_switched(text_denoiser):
    x = torch.randn(1, 4, 3, 3)
    with GradSAM(text_denoiser) as patch:
        assert patch.layers == ("cross.7",)
        expected = patch.score(lambda: text_denoiser(x, 1), SUBJECTS).scores
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                z = x.clone()
                scores = patch.score(lambda z=z: text_denoiser(z, 1), SUBJECTS).scores
                assert not torch.is_grad_enabled()
            assert torch.equal(scores, expected)

        def inner():
            with torch.no_grad():
                return text_denoiser(x, 1)

        assert torch.equal(patch.score(inner, SUBJECTS).scores, expected)
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in text_denoiser.parameters())
        assert not patch.scoring


def test_fast_mode_is_the_gradient_of_the_sum_at_the_querys_place(text_denoiser):
    model, x = text_denoiser.double(), torch.randn(1, 4, 3, 4, dtype=torch.float64)
    with GradSAM(model, options=GradSAMOptions(mode="fast")) as patch:
        out = patch.score(lambda: model(x, 1), [[2]]).scores
    # The last layer feeds each position alone here: a row of the Jacobian has one query.
    with GradSAM(model, options=GradSAMOptions(mode="exact")) as patch:
        exact = patch.score(lambda: model(x, 1), [[2]]).scores
    assert out.shape == exact.shape
    assert torch.equal(out[:, :, :, :1].expand_as(out), out)
    assert (out[:, :, :, 0] <= exact.sum(3) + 1e-12).all(), "a sum cancels, its parts do not"
    with (
        GradSAM(model, options=GradSAMOptions(mode="fast")) as patch,
        pytest.raises(ValueError, match="do not form a grid"),
    ):
        patch.score(lambda: model(x, 1).flatten(2)[:, :, None, :7], [[2]])


def test_aggregated_mode_weighs_maps_by_their_share_of_one_gradient(text_denoiser):
    """Written out from the maps and gradients that a layer's perturbation records."""
    model, x = text_denoiser.double(), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    subjects = [[2], [1, 3]]
    options = GradSAMOptions(mode="aggregated")
    names = tuple(select_attention(model, None, cross=True, default_count=99))
    assert len(names) > 1
    with GradSAM(model, layers=names, options=options) as patch:
        kept: dict = {}
        record = patch.record

        def keep(name, entry):
            kept[name] = entry
            record(name, entry)

        patch.record = keep
        out = patch.score(lambda: keep_graph(model(x, 1), kept), subjects)
    parts, maps = [], []
    for name in names:
        gradient = kept["gradients"][name]
        columns = [[[0, 1, 2].index(c - 1) for c in group] for group in subjects]
        parts.append(torch.stack([gradient[..., c].abs().sum((1, 2, 3)) for c in columns], 1))
        weights = kept[name].weights
        maps.append(torch.stack([weights[..., c].sum(-1).mean(1) for c in columns], 1))
    share = torch.stack(parts) / torch.stack(parts).sum(0)
    mixed = (share[..., None] * torch.stack(maps)).sum(0)
    expected = mixed.unflatten(2, (6, 8))[:, None, :, None].expand(-1, -1, -1, 4, -1, -1)
    torch.testing.assert_close(out.scores, expected)
    assert share.min() > 0.01, "every layer counts"
    mask = make_mask(out.scores, rule="aggregated")
    above = mixed > mixed.mean(2, keepdim=True)
    assert torch.equal(mask, above.any(1).unflatten(1, (6, 8))[:, None].expand(-1, 4, -1, -1))


def keep_graph(output, kept):
    """Gradients of the output's sum with respect to every layer's perturbation."""
    names = [name for name in kept if name != "gradients"]
    deltas = [kept[name].delta for name in names]
    found = torch.autograd.grad(output.sum(), deltas, retain_graph=True)
    kept["gradients"] = dict(zip(names, found, strict=True))
    return output


def test_scores_beside_references_and_style(text_denoiser):
    x, p = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 12)
    plain = GradSAM(text_denoiser)
    alone = plain.score(lambda: text_denoiser(x, 1), SUBJECTS)
    plain.remove()
    references = EasyRef(text_denoiser).set_references(p, 0.8)
    patch = GradSAM(text_denoiser)
    with_references = patch.score(lambda: text_denoiser(x, 1), SUBJECTS)
    torch.testing.assert_close(with_references.output, text_denoiser(x, 1).detach())
    assert not torch.allclose(with_references.scores, alone.scores, atol=1e-4)
    patch.remove()
    references.remove()
    # The official layout of the same references must give the same scores of the text's tokens.
    options = EasyRefOptions(appended=4, weight=0.8)
    with EasyRef(text_denoiser, options=options), GradSAM(text_denoiser) as patch:
        context = torch.cat([text_denoiser.empty, p], 1)
        result = patch.score(lambda: text_denoiser(x, 1, context), SUBJECTS)
        torch.testing.assert_close(result.scores, with_references.scores)
        with pytest.raises(ValueError, match="below the 5 tokens"):
            patch.score(lambda: text_denoiser(x, 1, context), [6])
    with StyleInjector(text_denoiser) as injector, GradSAM(text_denoiser) as patch:
        for role in ("content", "style"):
            with injector.capture(role):
                text_denoiser(torch.randn(1, 4, 3, 3), 1)
        with injector.inject():
            styled = patch.score(lambda: text_denoiser(x, 1), SUBJECTS)
        assert not torch.allclose(styled.scores, alone.scores, atol=1e-4)
        plain_again = patch.score(lambda: text_denoiser(x, 1), SUBJECTS)
        torch.testing.assert_close(plain_again.scores, alone.scores)


def test_a_patch_on_top_is_refused_with_a_reason(text_denoiser):
    x = torch.randn(1, 4, 3, 3)
    patch = GradSAM(text_denoiser)
    references = EasyRef(text_denoiser).set_references(torch.randn(1, 4, 12))
    with pytest.raises(RuntimeError, match="_DecoupledLayer and, below it, _ColumnLayer"):
        patch.score(lambda: text_denoiser(x, 1), SUBJECTS)
    references.clear()
    patch.score(lambda: text_denoiser(x, 1), SUBJECTS)
    references.remove()
    patch.remove()


def test_patch_refuses(text_denoiser, denoiser):
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(ValueError, match="no cross-attention"):
        GradSAM(denoiser)
    patch = GradSAM(text_denoiser)

    def call():
        return text_denoiser(x, 1)

    def twice():
        return text_denoiser(x, 1) + text_denoiser(x, 2)

    def detached():
        return text_denoiser(x, 1).detach()

    def inference():
        with torch.inference_mode():
            return text_denoiser(x, 1)

    for run, subjects, error, match in (
        (call, [5], ValueError, r"layer 'cross.7': subjects\[0\].*below the 5 tokens"),
        (call, [], ValueError, "subjects"),
        (lambda: x, [1], RuntimeError, "cross.7 were not reached"),
        (twice, [1], RuntimeError, "'cross.7' ran twice"),
        (detached, [1], RuntimeError, "carries no graph"),
        (lambda: call().repeat(2, 1, 1, 1), [1], RuntimeError, "one half of a guided batch"),
        (lambda: call()[0], [1], ValueError, "output of call: expected 4 dimensions"),
    ):
        with pytest.raises(error, match=match):
            patch.score(run, subjects)
        assert not patch.scoring
        assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match=r"graph|inference|Inference"):
        patch.score(inference, [1])
    patch.remove()
    with pytest.raises(RuntimeError, match="has been removed"):
        patch.score(call, [1])
    for change in ({"phi": "x"}, {"mode": "x"}, {"chunk": 0}):
        with pytest.raises(ValueError, match=r"phi|mode|chunk"):
            GradSAMOptions(**change)


# --- the whole method ----------------------------------------------------------------------------


def test_sampling_overwrites_at_the_chosen_steps_alone(text_denoiser):
    model = text_denoiser.double()
    g = torch.Generator().manual_seed(0)
    z, reference, noise = (
        torch.randn(1, 4, 3, 3, generator=g, dtype=torch.float64) for _ in range(3)
    )
    alphas, labels = torch.linspace(0.99, 0.05, 100, dtype=torch.float64), [90, 70, 50, 30, 10]
    empty = torch.zeros(1, 5, 12, dtype=torch.float64)

    def step(e, t, z):
        return 0.9 * z - 0.1 * e + 0.001 * t

    arguments = {
        "subjects": SUBJECTS,
        "labels": labels,
        "alphas_cumprod": alphas,
        "noise": noise,
        "predict_unconditional": lambda z, t: model(z, t, empty),
    }
    expected, masks = z, []
    for i, t in enumerate(labels):
        with torch.no_grad():
            c, u = model(expected, t), model(expected, t, empty)
        before, expected = expected, step(u + 8.0 * (c - u), t, expected)
        if i + 1 in (2, 4):
            with GradSAM(model) as patch:
                at_t = patch.score(lambda b=before, t=t: model(b, t), SUBJECTS)
            mask = make_mask(at_t.scores, rule="official")
            a = alphas[labels[i + 1]]
            masks.append(mask)
            expected = torch.where(mask, expected, a.sqrt() * reference + (1 - a).sqrt() * noise)
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    with GradSAM(model) as patch:
        outs = [
            keep_subjects(
                patch, model, step, z, reference, at=(2, 4, 9), rule="official", **arguments
            )
            for _ in range(2)
        ]
        with pytest.raises(ValueError, match="at: expected numbers of steps from 1"):
            keep_subjects(patch, model, step, z, reference, at=(0,), **arguments)
        with pytest.raises(ValueError, match="labels: expected labels in"):
            keep_subjects(patch, model, step, z, reference, **{**arguments, "labels": [100]})
    torch.testing.assert_close(outs[0], expected)
    assert torch.equal(*outs)
