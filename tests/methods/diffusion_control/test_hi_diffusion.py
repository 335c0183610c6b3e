"""HiDiffusion against recordings of the official code, its options, and its refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.methods.diffusion_control._rau_net import StridedDownsampler
from transfuse.methods.diffusion_control.hi_diffusion import (
    HiDiffusion,
    HiDiffusionOptions,
    RAUSchedule,
    UNetLayout,
    msw_shift,
    pool_features,
    rau_schedule,
    resize_tokens,
    restore_features,
    token_grid,
)
from transfuse.ops import window_partition, window_reverse
from transfuse.testing import golden

DATA = golden.load("hi_diffusion")


class Block(nn.Module):
    """x + attention(LayerNorm(x)), as a transformer block with a zero feed-forward."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), attention

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm1(hidden_states)
        return hidden_states + (self.attn1(x) if mask is None else self.attn1(x, mask=mask))


class Tokens(nn.Module):
    """Gives its second input to a block; the first only says how large the image is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, sample: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.block(x, mask)


class MaskedAttention(nn.Module):
    """Hand-written attention that takes a mask."""

    num_heads = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


def small(width: int = 16, seed: int = 0) -> Tokens:
    torch.manual_seed(seed)
    return Tokens(Block(MaskedAttention(width), width)).eval()


def options(**changes) -> HiDiffusionOptions:
    return HiDiffusionOptions(raunet=False, **changes)


# ---- recordings -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["win_even", "win_odd", "win_thin"])
@pytest.mark.parametrize("index", range(4))
def test_windows_of_the_official_code(case, index):
    params, x = DATA.params(case), DATA.inputs(case)["x"]
    size = (params["H"], params["W"])
    even = tuple(side + side % 2 for side in size)
    assert list(msw_shift(size, index)) == params["shifts"][index]
    where = {"size": even, "shift": msw_shift(even, index, variant="official")}
    if even != size:
        x = resize_tokens(x, size, even)
    windows = window_partition(x, **where)
    DATA.check(windows, f"windows_shift{index}", case)
    back = window_reverse(windows, **where)
    if even != size:
        back = resize_tokens(back, even, size)
    DATA.check(back, f"reversed_shift{index}", case)


@pytest.mark.parametrize("index", range(4))
def test_block_of_the_official_code(index):
    given, params = DATA.inputs("block"), DATA.params("block")
    model = small(params["dim"])
    model.load_state_dict(
        {
            "block.norm1.weight": given["norm_w"],
            "block.norm1.bias": given["norm_b"],
            "block.attn1.to_q.weight": given["wq"],
            "block.attn1.to_k.weight": given["wk"],
            "block.attn1.to_v.weight": given["wv"],
            "block.attn1.to_out.weight": given["wo"],
            "block.attn1.to_out.bias": given["bo"],
        }
    )
    sample = torch.zeros(2, 1, *params["latent"])
    for setting in (options(shift=index), options(shift=index, odd="resize", variant="official")):
        with torch.no_grad(), HiDiffusion(model, setting, layers=["block"]):
            DATA.check(model(sample, given["x"]), f"y_shift{index}", "block")


@pytest.mark.parametrize("case", ["rad", "rad_xl"])
def test_downsampler_of_the_official_code(case):
    params, given = DATA.params(case), DATA.inputs(case)
    schedule = rau_schedule(params["model"], tuple(params["latent"]), params["steps"])
    acts = [int(step in schedule.strided) for step in range(params["steps"])]
    assert acts == DATA.outputs(case)["active"].tolist()
    channels = given["w"].shape[:2]
    layer = nn.Conv2d(channels[1], channels[0], 3, stride=2, padding=1)
    layer.load_state_dict({"weight": given["w"], "bias": given["b"]})
    state = {"active": True}
    device = StridedDownsampler(layer, lambda: state["active"])
    with torch.no_grad():
        DATA.check(layer(given["x"]), "y_active", case)
        state["active"] = False
        DATA.check(layer(given["x"]), "y_inactive", case)
        state["active"] = True
        device.remove()
        DATA.check(layer(given["x"]), "y_inactive", case)
    assert (layer.stride, layer.padding, layer.dilation) == ((2, 2), (1, 1), (1, 1))


def test_an_adapter_beside_the_convolution_is_widened_with_it():
    """Low-rank adapters of a convolution: one of the same geometry, then one of 1 x 1."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.down = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False)
            self.up = nn.Conv2d(2, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    layer, x = Adapted(), torch.randn(1, 3, 13, 10)
    weight = layer.base.weight + torch.einsum(
        "or,rihw->oihw", layer.up.weight[:, :, 0, 0], layer.down.weight
    )
    expected = F.conv2d(x, weight, layer.base.bias, stride=4, padding=2, dilation=2)
    device = StridedDownsampler(layer, lambda: True)
    torch.testing.assert_close(layer(x), expected)
    device.remove()
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.base.bias, 2, 1))


def test_pooled_block_of_the_official_code():
    params, x = DATA.params("raupool"), DATA.inputs("raupool")["x"]
    schedule = rau_schedule(params["model"], tuple(params["latent"]), params["steps"])
    acts = [int(step in schedule.pooled) for step in range(params["steps"])]
    assert acts == DATA.outputs("raupool")["active"].tolist()
    DATA.check(pool_features(x), "pooled", "raupool")
    DATA.check(restore_features(pool_features(x), (7, 10)), "restored", "raupool")


# ---- windows ----------------------------------------------------------------------------------


def by_hand(block: Block, x: Tensor, size, index: int, *, odd: str, variant: str) -> Tensor:
    """The block with its normed input cut into windows, plain attention in each."""
    even = tuple(side + side % 2 for side in size) if odd == "resize" else size
    where = {"size": even, "shift": msw_shift(even, index, variant=variant)}
    y = block.norm1(x)
    if even != size:
        y = resize_tokens(y, size, even)
    places = torch.arange(1, 1 + even[0] * even[1], dtype=y.dtype)[None, :, None]
    windows = window_partition(y, **where)
    taken = window_partition(places, **where)[..., 0].repeat(x.shape[0], 1) > 0
    out = block.attn1(windows, taken[:, None, None, :])
    y = window_reverse(out, **where)
    return x + (y if even == size else resize_tokens(y, even, size))


@pytest.mark.parametrize("size", [(8, 12), (7, 10), (9, 5), (6, 16), (1, 9), (2, 2), (3, 1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("odd", "variant"), [("exact", "paper"), ("resize", "paper"), ("resize", "official")]
)
def test_layer_equals_attention_on_cut_windows(size, batch, odd, variant):
    model = small()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, size[0] * size[1], 16, generator=generator)
    for index in range(4):
        expected = by_hand(model.block, x, size, index, odd=odd, variant=variant)
        setting = options(shift=index, odd=odd, variant=variant)
        with torch.no_grad(), HiDiffusion(model, setting, layers=["block"]):
            out = model(torch.zeros(1, 1, *size), x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_the_three_readings_of_odd_and_thin_grids_differ():
    model = small()
    for size, one, other in (
        ((7, 10), {"odd": "exact"}, {"odd": "resize"}),
        ((6, 16), {"variant": "paper"}, {"variant": "official"}),
    ):
        x = torch.randn(1, size[0] * size[1], 16, generator=torch.Generator().manual_seed(1))
        outs = []
        for changes in (one, other):
            with torch.no_grad(), HiDiffusion(model, options(shift=1, **changes), layers=["block"]):
                outs.append(model(torch.zeros(1, 1, *size), x))
        assert (outs[0] - outs[1]).abs().max() > 1e-3


def test_grids_of_every_level():
    for height in range(1, 40):
        for width in (1, 7, 16, 31):
            size = (height, width)
            for _ in range(6):
                assert token_grid((height, width), size[0] * size[1]) == size
                size = tuple(-(-side // 2) for side in size)
    with pytest.raises(ValueError, match=r"8 x 8 has no grid of 17 tokens"):
        token_grid((8, 8), 17)
    with pytest.raises(ValueError, match=r"8 x 8 has no grid of 65 tokens"):
        token_grid((8, 8), 65)


def test_gradients_reach_the_layer():
    model = small().double()
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    with HiDiffusion(model, options(shift=2), layers=["block"]):
        out = model(torch.zeros(1, 1, 3, 4), x)
        got = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
    expected = by_hand(model.block, x, (3, 4), 2, odd="exact", variant="paper")
    wanted = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_shifts_are_drawn_privately_and_can_be_replayed():
    model = small()
    x, sample = torch.randn(2, 96, 16), torch.zeros(1, 1, 8, 12)
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        with torch.no_grad(), HiDiffusion(model, options(seed=seed), layers=["block"]) as patch:
            runs.append(([model(sample, x) for _ in range(8)], patch.drawn))
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0][1] == runs[1][1]
    assert runs[0][1] != runs[2][1]
    assert len(set(runs[0][1])) > 1
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    with torch.no_grad(), HiDiffusion(model, options(seed=5), layers=["block"]) as patch:
        patch.replay(runs[2][1])
        assert all(torch.equal(model(sample, x), out) for out in runs[2][0])
        with pytest.raises(RuntimeError, match="replay: the shifts are used up"):
            model(sample, x)
        with pytest.raises(ValueError, match=r"shifts: expected 1 numbers per call.*got 2"):
            patch.replay([(0, 1)])
        with pytest.raises(ValueError, match="shifts: expected 0, 1, 2 or 3, got 4"):
            patch.replay([(4,)])


def test_every_shift_is_as_likely(denoiser):
    with torch.no_grad(), HiDiffusion(denoiser, options(), layers=["blocks"]) as patch:
        for _ in range(100):
            denoiser(torch.zeros(1, 4, 2, 2), 1)
    counts = torch.tensor(patch.drawn).flatten().bincount(minlength=4)
    assert counts.sum() == 800
    assert counts.min() > 150
    assert torch.tensor(patch.drawn).unique(dim=1).shape[1] == 8  # one draw per layer


def test_redraw_only_with_the_timestep(denoiser):
    x = torch.randn(1, 4, 8, 8)
    setting = options(redraw="timestep")
    with torch.no_grad(), HiDiffusion(denoiser, setting, layers=["blocks"]) as patch:
        for time in (3, 3, 2, torch.tensor([2, 2]), 3):
            denoiser(x, time)
    first, second, third, fourth, fifth = patch.drawn
    assert first == second != third
    assert third == fourth != fifth


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"odd": "pad"}, ValueError, "odd: expected one of 'exact', 'resize', got"),
        ({"variant": "swin"}, ValueError, "variant: expected one of"),
        ({"redraw": "step"}, ValueError, "redraw: expected one of"),
        ({"model": "flux"}, ValueError, "model: expected one of 'sd15'"),
        ({"shift": 4}, ValueError, "shift: expected 0, 1, 2 or 3, got 4"),
        ({"shift": True}, ValueError, "shift: expected 0, 1, 2 or 3, got True"),
        ({"schedule": 3}, TypeError, "schedule: expected a callable, got 3"),
        ({"raunet": False, "windows": False}, ValueError, "at least one of them"),
    ],
)
def test_options_that_do_not_fit(changes, error, match):
    with pytest.raises(error, match=match):
        HiDiffusionOptions(**changes)


def test_layers_that_cannot_be_windowed():
    model = small()
    x, sample = torch.randn(1, 96, 16), torch.zeros(1, 1, 8, 12)
    with HiDiffusion(model, options(), layers=["block"]):
        with pytest.raises(ValueError, match="received an attention mask: it speaks of all tokens"):
            model(sample, x, torch.ones(96, 96, dtype=torch.bool))
        with pytest.raises(
            ValueError, match=r"'block\.attn1': a latent of 8 x 12 has no grid of 95"
        ):
            model(sample, x[:, :95])
        with pytest.raises(ValueError, match=r"shape \(B, C, H, W\), got \(8, 12\)"):
            model(sample[0, 0], x)

    model.block.attn1.residual_connection = True
    with (
        HiDiffusion(model, options(odd="resize"), layers=["block"]),
        pytest.raises(ValueError, match=r"odd='resize' needs a layer on \(B, N, C\)"),
    ):
        model(torch.zeros(1, 1, 5, 4), x[:, :20])
    del model.block.attn1.residual_connection

    def shorten(layer, args):
        return (args[0][:, :24],)  # a grid of its own: 4 x 6

    hook = model.block.attn1.register_forward_pre_hook(shorten)
    with (
        HiDiffusion(model, options(), layers=["block"]),
        pytest.raises(RuntimeError, match="96 tokens enter its block and 24 its attention"),
    ):
        model(sample, x)
    hook.remove()
    with (
        HiDiffusion(model, options(), layers=["block"]),
        pytest.raises(RuntimeError, match="was called without its model"),
    ):
        model.block(x)


def test_unknown_structures_say_what_is_known(denoiser):
    with pytest.raises(ValueError, match=r"no down_blocks and up_blocks: supported are .*raunet="):
        HiDiffusion(denoiser)
    with pytest.raises(ValueError, match=r"forward has no timestep: choose raunet=False"):
        HiDiffusion(small(), options(redraw="timestep"), layers=["block"])
    layout = UNetLayout(model="sd15", windows=(), strided=0, pooled=1)
    setting = HiDiffusionOptions(windows=False, layout=layout)
    with pytest.raises(ValueError, match="layers: chooses the windowed layers"):
        HiDiffusion(small(), setting, layers=["block"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("sd3", (64, 64), 50), "model: expected one of sd15, sd21, sdxl, sdxl_turbo, got 'sd3'"),
        (("sd15", (64,), 50), r"latent: expected \(height, width\)"),
        (("sd15", (64, 0), 50), "latent: expected an integer of at least 1, got 0"),
        (("sd15", (64, 64), 0), "steps: expected an integer of at least 1, got 0"),
    ],
)
def test_schedules_that_do_not_fit(arguments, match):
    with pytest.raises(ValueError, match=match):
        rau_schedule(*arguments)
    with pytest.raises(TypeError, match="pooled: expected a range of steps"):
        RAUSchedule(range(3), (0, 3))
