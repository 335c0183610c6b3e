"""EasyRef: official outputs, decoupled attention, reference tokens, the patch, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.diffusion_control.easy_ref import (
    Branch,
    EasyRef,
    EasyRefOptions,
    ProjectionMLP,
    ReferenceAggregator,
    decoupled_attention,
    pad_groups,
    reference_mask,
    sample_drops,
)
from transfuse.methods.diffusion_control.style_injection import StyleInjector
from transfuse.testing import golden

GOLDEN = golden.load("easy_ref")


def dense(query, branches):
    """The formula written out, independent of the library."""
    total = 0
    for key, value, weight in branches:
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
        p = (torch.einsum("bhnd,bhmd->bhnm", query, key) / query.shape[-1] ** 0.5).softmax(-1)
        total = total + weight * torch.einsum("bhnm,bhmv->bhnv", p, value)
    return total


class Adapted(nn.Module):
    """W + scale * up down, as a fine-tuned stage has it."""

    def __init__(self, weight, down, up, scale, bias=None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias
        self.down, self.up, self.scale = down, up, scale

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.scale * (x @ self.down.T) @ self.up.T


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class Layer(nn.Module):
    """Cross-attention of the golden arrays; its own forward must never run."""

    is_cross_attention = True

    def __init__(self, x, params):
        super().__init__()
        self.heads = params["heads"]
        self.residual_connection = params["residual"]
        self.rescale_output_factor = params["rescale_output_factor"]
        scale = params["lora_scale"]
        for name in ("q", "k", "v", "o"):
            bias = x["bo"] if name == "o" else None
            lora = "out" if name == "o" else name
            if params["lora_rank"] is None:
                part = linear(x[f"w{name}"], bias)
            else:
                down, up = x[f"lora_{lora}_down"], x[f"lora_{lora}_up"]
                part = Adapted(x[f"w{name}"], down, up, scale, bias)
            setattr(self, "to_out" if name == "o" else f"to_{name}", part)

    def forward(self, x, encoder_hidden_states=None, attention_mask=None):
        raise AssertionError("the patch computes it")


def load_references(patch, x):
    patch.load_state_dict(
        {"adapters.0.0.to_k_ref.weight": x["wk_ip"], "adapters.0.0.to_v_ref.weight": x["wv_ip"]}
    )


# --- against the official implementation ---------------------------------------------------------


class Processed(Layer):
    """The same with the processor protocol, which is what takes a context."""

    def __init__(self, x, params):
        super().__init__(x, params)
        self.processor = AttnProcessor()

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, x, encoder_hidden_states=None, attention_mask=None):
        return self.processor(self, x, encoder_hidden_states, attention_mask)


class AttnProcessor:
    def __call__(self, attn, x, context=None, mask=None, temb=None):
        raise AssertionError("the patch computes it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["ip", "ip_img", "ip_lora"])
@pytest.mark.parametrize("layout", ["appended", "beside"])
@torch.no_grad()
def test_layer_matches_the_official_code(case, layout, dtype):
    x, params = GOLDEN.inputs(case, dtype), GOLDEN.params(case)
    layer, count = Processed(x, params), params["reference_tokens"]
    if layout == "appended":
        options = EasyRefOptions(appended=count, weight=params["scale"])
        patch = EasyRef(layer, options=options)
        load_references(patch, x)
        out = layer(x["x"], x["ctx"])
    else:
        patch = EasyRef(layer)
        load_references(patch, x)
        patch.set_references(x["ctx"][:, -count:], params["scale"])
        out = layer(x["x"], x["ctx"][:, :-count])
    GOLDEN.check(out, "y", case)


def test_projection_matches_the_official_code():
    x = GOLDEN.inputs("proj")
    projection = ProjectionMLP(10, 12)
    projection.load_state_dict(
        {
            "inward.weight": x["w1"],
            "inward.bias": x["b1"],
            "outward.weight": x["w2"],
            "outward.bias": x["b2"],
            "norm.weight": x["ln_w"],
            "norm.bias": x["ln_b"],
        }
    )
    GOLDEN.check(projection(x["x"]), "y", "proj")
    assert ProjectionMLP(10, 12, out_dtype=torch.float16)(x["x"]).dtype == torch.float16


# --- decoupled attention -------------------------------------------------------------------------


def qkv(dtype=torch.float64, n=7, batch=2):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, 3, n, 8), (batch, 3, 5, 8), (batch, 3, 5, 6), (1, 3, 4, 8), (1, 3, 4, 6)]
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("weight", "shape"),
    [
        (0.7, ()),
        (torch.tensor([0.5, -1.0]), (2, 1, 1, 1)),
        (torch.arange(6.0).reshape(2, 3), (2, 3, 1, 1)),
        (torch.arange(14.0).reshape(2, 1, 7), (2, 1, 7, 1)),
        (torch.tensor(2.0), ()),
    ],
)
def test_decoupled_attention_is_the_formula(weight, shape):
    q, k, v, kr, vr = qkv()
    out = decoupled_attention(q, [(k, v), (kr, vr, weight), (2 * kr, vr, 0.25)])
    full = torch.as_tensor(weight, dtype=q.dtype).reshape(shape)
    torch.testing.assert_close(out, dense(q, [(k, v, 1), (kr, vr, full), (2 * kr, vr, 0.25)]))


def test_zero_weight_leaves_text_alone_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, kr, vr = qkv(dtype)
        alone = decoupled_attention(q, [(k, v)])
        poison = torch.full_like(kr, math.nan)
        assert torch.equal(decoupled_attention(q, [(k, v), (poison, vr, 0.0)]), alone)
    assert torch.equal(decoupled_attention(q, [(k, v, 0.0)]), torch.zeros_like(alone))


def test_each_branch_has_its_own_mask():
    q, k, v, kr, vr = qkv()
    keep, keep_r = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    expected = dense(
        q, [(k[:, :, keep], v[:, :, keep], 1), (kr[:, :, keep_r], vr[:, :, keep_r], 1)]
    )
    bias = torch.zeros(4, dtype=q.dtype).masked_fill(~keep_r, -math.inf)
    for mask in (keep_r, bias):
        out = decoupled_attention(q, [Branch(k, v, 1.0, keep), Branch(kr, vr, 1.0, mask)])
        torch.testing.assert_close(out, expected)
    nothing = Branch(kr, vr, 1.0, torch.zeros(4).bool())
    torch.testing.assert_close(
        decoupled_attention(q, [(k, v), nothing]), decoupled_attention(q, [(k, v)])
    )


def test_gradients_reach_everything():
    tensors = [x.requires_grad_() for x in qkv()]
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    q, k, v, kr, vr = tensors
    decoupled_attention(q, [(k, v), (kr, vr, weight)]).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (*tensors, weight))


@pytest.mark.parametrize(
    ("branches", "error", "match"),
    [
        (lambda k, v: [], ValueError, "at least one branch"),
        (lambda k, v: (k, v), TypeError, r"branches\[0\]: expected \(key, value"),
        (lambda k, v: Branch(k, v), ValueError, "sequence of at least one branch"),
        (lambda k, v: [(k,)], TypeError, r"branches\[0\]"),
        (lambda k, v: [(k, v, math.nan)], ValueError, r"branches\[0\].weight.*finite"),
        (lambda k, v: [(k, v), (k, v, "1")], TypeError, r"branches\[1\].weight"),
        (lambda k, v: [(k, v, torch.zeros(3))], ValueError, r"branches\[0\].weight.*\(3, 1, 1\)"),
        (lambda k, v: [(k, v, torch.zeros(1, 1, 1, 1))], ValueError, r"weight: expected a number"),
        (lambda k, v: [(k[:, :, :3], v)], ValueError, "key"),
        (lambda k, v: [(k[..., :3], v)], ValueError, "head dim"),
    ],
)
def test_decoupled_attention_refuses(branches, error, match):
    q, k, v, _, _ = qkv(torch.float32)
    with pytest.raises(error, match=match):
        decoupled_attention(q, branches(k, v))


# --- reference tokens ----------------------------------------------------------------------------


class Encoder(nn.Module):
    """One explicit transformer layer: attention under a mask, residual, feed-forward."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden, mask):
        q, k, v = (x[:, None] for x in self.qkv(hidden).chunk(3, dim=-1))
        p = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf).softmax(-1)
        return hidden + self.out((p @ v)[:, 0]).tanh()


def test_reference_mask_both_rules():
    valid = torch.tensor([[True, True, False]])
    both = reference_mask(valid, 2)[0, 0]
    assert both[3].tolist() == [True, True, False, True, True]
    causal = reference_mask(valid, 2, causal_references=True)[0, 0]
    assert causal[3].tolist() == [True, True, False, True, False]
    assert causal[4].tolist() == [True, True, False, True, True]
    assert both.any(-1).all()
    assert causal.any(-1).all()


def test_aggregator_is_one_layer_on_the_longer_sequence():
    layer, hidden = Encoder(), torch.randn(2, 6, 8)
    aggregator = ReferenceAggregator(layer, 3, 8, norm=nn.LayerNorm(8))
    joined = torch.cat([hidden, aggregator.references.expand(2, -1, -1)], 1)
    full = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    torch.testing.assert_close(
        aggregator(hidden), aggregator.norm(layer(joined, full))[:, -3:], atol=1e-6, rtol=1e-5
    )
    causal = ReferenceAggregator(layer, 3, 8, causal_references=True)
    causal.references = aggregator.references
    expected = layer(joined, full.tril())[:, -3:]
    torch.testing.assert_close(causal(hidden), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(causal(hidden)[:, 0], layer(joined, full)[:, 6], atol=1e-4)


def test_padding_does_not_matter_and_an_empty_group_is_no_nan():
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 8, generator=g) for n in (2, 3, 1)]
    aggregator = ReferenceAggregator(Encoder(), 4, 8)
    padded = pad_groups([images, images[:1], []])
    assert padded.mask.sum(1).tolist() == [6, 2, 0]
    tokens = torch.where(padded.mask[..., None], padded.tokens, math.nan)
    out = aggregator(tokens, padded.mask)
    for row, group in zip(out, (images, images[:1], []), strict=True):
        alone = torch.cat([*group, torch.empty(0, 8)])[None]
        torch.testing.assert_close(row, aggregator(alone)[0], atol=1e-6, rtol=1e-5)
    out.sum().backward()
    assert aggregator.references.grad.isfinite().all()
    assert aggregator.references.grad.abs().sum() > 0


def test_order_matters_to_causal_references_only_through_the_layer():
    # A group is no average: two groups averaged are not one group of both.
    aggregator = ReferenceAggregator(Encoder(), 4, 8)
    a, b = torch.randn(2, 1, 3, 8).unbind()
    together = aggregator(torch.cat([a, b], 1))
    assert not torch.allclose(together, (aggregator(a) + aggregator(b)) / 2, atol=1e-3)


def test_aggregator_is_seeded_and_round_trips():
    first, second = (
        ReferenceAggregator(Encoder(), 4, 8, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(first.references, second.references)
    assert 0.05 < first.references.std() < 0.2
    assert "references" in first.state_dict()
    assert "num_references=4" in repr(first)


def test_aggregation_refuses():
    aggregator = ReferenceAggregator(Encoder(), 4, 8)
    for hidden, mask, error, match in (
        (torch.zeros(2, 8), None, ValueError, "hidden: expected 3 dimensions"),
        (torch.zeros(2, 5, 7), None, ValueError, "width of the references"),
        (torch.zeros(2, 5, 8), torch.ones(2, 5), ValueError, "mask: expected bool"),
        (torch.zeros(2, 5, 8), torch.ones(2, 4).bool(), ValueError, r"mask: .*\(2, 5\)"),
    ):
        with pytest.raises(error, match=match):
            aggregator(hidden, mask)
    for bad, error in ((0, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="num_references"):
            ReferenceAggregator(Encoder(), bad, 8)
    with pytest.raises(ValueError, match="at least one image"):
        pad_groups([[], []])
    with pytest.raises(ValueError, match="width of the first image"):
        pad_groups([[torch.zeros(1, 2)], [torch.zeros(1, 3)]])


def test_drops_are_exclusive_events_of_the_given_probability():
    g = torch.Generator().manual_seed(0)
    text, reference = sample_drops(200_000, p=0.05, generator=g)
    for event in (text & reference, text & ~reference, reference & ~text):
        assert abs(event.double().mean() - 0.05) < 0.003
    again = sample_drops(200_000, p=0.05, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.text, text)
    with pytest.raises(ValueError, match="p: expected a probability"):
        sample_drops(3, p=0.5)


# --- the patch -----------------------------------------------------------------------------------


def context(batch=1, tokens=4, dtype=torch.float32, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 12, generator=g).to(dtype)


@torch.no_grad()
def test_idle_zero_and_cleared_references_leave_the_model(text_denoiser):
    x = torch.randn(2, 4, 4, 4)
    expected = text_denoiser(x, 1)
    patch = EasyRef(text_denoiser)
    assert len(patch.layers) == 8
    assert torch.equal(text_denoiser(x, 1), expected)
    patch.set_references(context(), 0.0)
    torch.testing.assert_close(text_denoiser(x, 1), expected)
    patch.set_references(context(), 1.0)
    assert not torch.allclose(text_denoiser(x, 1), expected, atol=1e-3)
    patch.clear()
    assert torch.equal(text_denoiser(x, 1), expected)
    patch.remove()
    assert torch.equal(text_denoiser(x, 1), expected)


@torch.no_grad()
def test_references_per_sample_equal_samples_alone(text_denoiser):
    x, p = torch.randn(2, 4, 4, 4), context(2)
    with EasyRef(text_denoiser) as patch:
        patch.set_references(p, torch.tensor([0.4, 1.0]))
        both = text_denoiser(x, 1)
        for i, weight in enumerate((0.4, 1.0)):
            patch.set_references(p[i : i + 1], weight)
            torch.testing.assert_close(text_denoiser(x[i : i + 1], 1)[0], both[i])


@torch.no_grad()
def test_two_adapters_add_up(text_denoiser):
    x, first, second = torch.randn(1, 4, 4, 4), context(), context(tokens=3, seed=4)
    with EasyRef(text_denoiser, layers=["cross.7"], options=EasyRefOptions(adapters=2)) as patch:
        outs = [
            text_denoiser(x, 1)
            for weights in ((1.0, 0.5), (1.0, 0.0), (0.0, 0.5), (0.0, 0.0))
            if patch.set_references([first, second], weights)
        ]
    # One layer, the last: the model's output is linear in what it adds.
    torch.testing.assert_close(outs[0] - outs[3], outs[1] + outs[2] - 2 * outs[3])


@torch.no_grad()
def test_keys_are_kept_while_nothing_changes(text_denoiser, monkeypatch):
    x, p = torch.randn(1, 4, 4, 4), context()
    with EasyRef(text_denoiser) as patch:
        calls = []
        projections = patch.adapters[0][0]
        project = projections._project
        monkeypatch.setattr(
            projections, "_project", lambda *a: calls.append(1) or project(*a), raising=True
        )
        patch.set_references(p)
        first = text_denoiser(x, 1)
        assert torch.equal(text_denoiser(x, 1), first)
        assert len(calls) == 1
        assert patch.cached_bytes() == 8 * 2 * 4 * 16 * 4
        p.mul_(2)  # in place
        changed = text_denoiser(x, 1)
        assert not torch.equal(changed, first)
        projections.to_k_ref.weight.mul_(2)
        assert not torch.equal(text_denoiser(x, 1), changed)
        assert len(calls) == 3
        patch.set_references(p.clone())
        text_denoiser(x, 1)
        assert len(calls) == 4


def test_inference_mode_and_training(text_denoiser):
    x = torch.randn(1, 4, 4, 4)
    with EasyRef(text_denoiser) as patch:
        with torch.inference_mode():
            patch.set_references(context())
            out = text_denoiser(x, 1)
        patch.set_references(context().requires_grad_())
        trained = text_denoiser(x, 1)
        torch.testing.assert_close(trained.detach(), out)
        text_denoiser.requires_grad_(False)
        before = [p.clone() for p in patch.parameters()]
        optimizer = torch.optim.SGD(patch.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = text_denoiser(x, 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(not torch.equal(a, b) for a, b in zip(before, patch.parameters(), strict=True))
        assert patch.references[0][0].grad.abs().sum() > 0


def test_state_dict_round_trip(text_denoiser):
    keys = set(text_denoiser.state_dict())
    with EasyRef(text_denoiser) as patch:
        assert set(text_denoiser.state_dict()) == keys, "nothing of the patch in the model's state"
        state = {name: torch.randn_like(x) for name, x in patch.state_dict().items()}
        assert len(state) == 16
        patch.load_state_dict(state)
        assert all(torch.equal(state[name], x) for name, x in patch.state_dict().items())


@torch.no_grad()
def test_fewer_key_heads_than_query_heads(text_denoiser):
    x, p = torch.randn(2, 4, 4, 4), context()
    layer = text_denoiser.cross[7]
    layer.to_k, layer.to_v = (nn.Linear(12, 8, bias=False) for _ in range(2))  # one head of two
    with EasyRef(text_denoiser, layers=["cross.7"]) as patch:
        patch.set_references(p, 0.5)
        grouped = text_denoiser(x, 1)
    for name in ("to_k", "to_v"):
        wide = nn.Linear(12, 16, bias=False)
        wide.weight.copy_(getattr(layer, name).weight.repeat(2, 1))
        setattr(layer, name, wide)
    with EasyRef(text_denoiser, layers=["cross.7"]) as patch:
        patch.set_references(p, 0.5)
        torch.testing.assert_close(grouped, text_denoiser(x, 1))


@torch.no_grad()
def test_starts_from_the_projections_of_the_text(text_denoiser):
    with EasyRef(text_denoiser, layers=[3]) as patch:
        assert patch.layers == ("cross.3",)
        own = patch.adapters[0][0]
        assert torch.equal(own.to_k_ref.weight, text_denoiser.cross[3].to_k.weight)
        assert own.to_k_ref.weight is not text_denoiser.cross[3].to_k.weight


@torch.no_grad()
def test_works_beside_style_injection(text_denoiser):
    x = torch.randn(1, 4, 4, 4)
    injector = StyleInjector(text_denoiser)
    patch = EasyRef(text_denoiser).set_references(context())
    for role in ("content", "style"):
        with injector.capture(role):
            text_denoiser(torch.randn(1, 4, 4, 4), 1)
    outs = {}
    for style in (False, True):
        for reference in (False, True):
            patch.set_references(context(), float(reference))
            if style:
                with injector.inject():
                    outs[style, reference] = text_denoiser(x, 1)
            else:
                outs[style, reference] = text_denoiser(x, 1)
    values = list(outs.values())
    assert all(
        not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(values) for b in values[:i]
    )


@torch.no_grad()
def test_two_active_patches_on_one_layer_are_refused(text_denoiser):
    x = torch.randn(1, 4, 4, 4)
    low, high = EasyRef(text_denoiser), EasyRef(text_denoiser)
    low.set_references(context())
    below = text_denoiser(x, 1)
    high.set_references(context())
    with pytest.raises(RuntimeError, match=r"'cross.0': _DecoupledLayer and, below it, .* active"):
        text_denoiser(x, 1)
    high.clear()
    assert torch.equal(text_denoiser(x, 1), below)


@torch.no_grad()
def test_patch_refuses(text_denoiser, denoiser):
    with pytest.raises(ValueError, match="no cross-attention"):
        EasyRef(denoiser)
    with pytest.raises(ValueError, match="no cross-attention layer matches 'blocks'"):
        EasyRef(text_denoiser, layers=["blocks"])
    x = torch.randn(2, 4, 4, 4)
    with EasyRef(text_denoiser) as patch:
        for arguments, error, match in (
            ((torch.zeros(1, 4, 11),), ValueError, "context width of the model"),
            ((torch.zeros(4, 12),), ValueError, r"references\[0\]: expected 3 dimensions"),
            (([context(), context()],), ValueError, r"references: expected 1 \(adapters\), got 2"),
            ((context(), [1.0, 2.0]), ValueError, r"weight: expected 1 \(adapters\), got 2"),
            ((context(), math.inf), ValueError, r"weight\[0\].*finite"),
            ((context(), torch.tensor([math.nan])), ValueError, r"weight\[0\].*finite"),
        ):
            with pytest.raises(error, match=match):
                patch.set_references(*arguments)
        patch.set_references(context(3))
        with pytest.raises(ValueError, match=r"layer 'cross.0'.*batch 2"):
            text_denoiser(x, 1)
        patch.set_references(context(), torch.ones(2, 1, 9))
        with pytest.raises(ValueError, match=r"layer 'cross.0'.*weight"):
            text_denoiser(x, 1)
    with EasyRef(text_denoiser, options=EasyRefOptions(appended=5)) as patch:
        with pytest.raises(ValueError, match=r"more than 5 tokens .*got \(2, 5, 12\)"):
            text_denoiser(x, 1)
        with pytest.raises(ValueError, match="appended"):
            patch.set_references(context())
    for change, error in (
        ({"adapters": 0}, ValueError),
        ({"appended": 0}, ValueError),
        ({"appended": 4, "adapters": 2}, ValueError),
        ({"weight": math.nan}, ValueError),
        ({"adapters": "2"}, TypeError),
    ):
        with pytest.raises(error, match=r"adapters|appended|weight"):
            EasyRefOptions(**change)
