"""What the contract tests do not say about window_attention: what its windows are."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import transfuse
from transfuse.ops import KV, _windows, attend, window_attention, window_partition, window_reverse
from transfuse.testing.golden import load


def _owner(token, size, window, shift, wrap, ragged):
    """Window and slot of a token on one axis, from the definition."""
    if wrap == "none":
        position = token + (-shift) % window
        return (position // window, False), position % window
    period = -(-size // window) * window if ragged == "pad" else size
    position = (token - shift) % period
    return (position // window, wrap == "mask" and token < shift % period), position % window


def _dense(query, key, value, size, window, shift, wrap, ragged, bias):
    """Attention over all tokens under the mask of the definition; bias is full."""
    owners, slots = [], []
    for token in itertools.product(*(range(n) for n in size)):
        parts = [
            _owner(y, n, w, s, wrap, ragged)
            for y, n, w, s in zip(token, size, window, shift, strict=True)
        ]
        owners.append(tuple(p[0] for p in parts))
        slot = 0
        for (_, at), w in zip(parts, window, strict=True):
            slot = slot * w + at
        slots.append(slot)
    same = torch.tensor([[a == b for b in owners] for a in owners])
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        index = torch.tensor(slots)
        scores = scores + bias[:, index[:, None], index[None, :]]
    return torch.softmax(scores.masked_fill(~same, -torch.inf), -1) @ value


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("ragged", ["exact", "pad"])
@pytest.mark.parametrize("wrap", ["cyclic", "mask", "none"])
@pytest.mark.parametrize(
    ("size", "window"), [((6, 8), (3, 4)), ((7, 5), (3, 2)), ((3, 4, 5), (2, 4, 3)), ((13,), (5,))]
)
def test_is_attention_under_the_mask_of_its_windows(size, window, wrap, ragged, backend):
    generator = torch.Generator().manual_seed(0)
    tokens, slots = torch.Size(size).numel(), torch.Size(window).numel()
    q, k, v = torch.randn(3, 2, 2, tokens, 4, generator=generator, dtype=torch.float64).unbind(0)
    bias = torch.randn(2, slots, slots, generator=generator, dtype=torch.float64)
    for shift in ((0,) * len(size), (1,) * len(size), (2, -1, 4)[: len(size)]):
        for given in (None, bias):
            want = _dense(q, k, v, size, window, shift, wrap, ragged, given)
            got = window_attention(
                q, k, v, size=size, window=window, shift=shift, wrap=wrap, ragged=ragged,
                bias=given, backend=backend,
            )  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_relative_bias_is_that_of_swin():
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    q, k, v = torch.randn(3, 1, 3, 48, 4, generator=generator, dtype=torch.float64).unbind(0)
    # Swin's own index of the flattened table.
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")).flatten(1)
    relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0)
    index = (relative[..., 0] + 2) * 7 + relative[..., 1] + 3
    full = table.flatten(1)[:, index]
    options = {"size": (6, 8), "window": (3, 4), "shift": (1, 2), "wrap": "mask"}
    want = window_attention(q, k, v, bias=full, **options)
    got = window_attention(q, k, v, bias=table, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    # Larger than the query, the table is looked up in the kernel instead.
    small = [x[:, :, :, :1].contiguous() for x in (q, k, v)]
    want = window_attention(*small, bias=full, **options)
    got = window_attention(*small, bias=table, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", ["win_even", "win_thin"])
def test_partition_matches_the_recording(case):
    golden = load("hi_diffusion")
    x, params = golden.inputs(case)["x"], golden.params(case)
    size = (params["H"], params["W"])
    for number, shift in enumerate(params["shifts"]):
        # The official code leaves both axes in place where the vertical shift is 0.
        shift = (0, 0) if shift[0] == 0 else tuple(shift)
        windows = window_partition(x, size=size, shift=shift)
        assert torch.equal(windows, golden.outputs(case)[f"windows_shift{number}"])
        assert torch.equal(window_reverse(windows, size=size, shift=shift), x)


def test_matches_the_recorded_block():
    golden = load("hi_diffusion")
    t, params = golden.inputs("block"), golden.params("block")
    normed = F.layer_norm(t["x"], (params["dim"],), t["norm_w"], t["norm_b"], params["norm_eps"])
    q, k, v = (
        (normed @ t[name].T).unflatten(-1, (params["heads"], -1)).transpose(1, 2)
        for name in ("wq", "wk", "wv")
    )
    for number in range(4):
        out = window_attention(
            q, k, v, size=(params["H"], params["W"]), shift=(number, number * (6 // 4))
        )
        result = t["x"] + out.transpose(1, 2).flatten(2) @ t["wo"].T + t["bo"]
        golden.check(result, f"y_shift{number}", "block")


@pytest.mark.parametrize(
    ("size", "shift"), [((7, 5), (2, 1)), ((6, 8), (-3, 11)), ((1, 9), (0, 4))]
)
def test_reverse_undoes_partition(size, shift):
    x = torch.randn(3, torch.Size(size).numel(), 2, requires_grad=True)
    for window in ("half", 3):
        windows = window_partition(x, size=size, window=window, shift=shift)
        assert torch.equal(window_reverse(windows, size=size, window=window, shift=shift), x)
    (gradient,) = torch.autograd.grad(windows.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_partition_refuses_what_does_not_fit():
    x = torch.zeros(2, 12, 3)
    with pytest.raises(ValueError, match=r"size: expected a product of 12"):
        window_partition(x, size=(3, 5))
    with pytest.raises(ValueError, match=r"windows: expected a multiple of 4"):
        window_reverse(torch.zeros(6, 4, 3), size=(4, 4), window=2)
    with pytest.raises(ValueError, match=r"windows: expected 4 .*slots"):
        window_reverse(torch.zeros(8, 3, 3), size=(4, 4), window=2)
    with pytest.raises(ValueError, match=r"x: expected"):
        window_partition(x[0], size=(3, 4))


def test_one_window_is_attend_bit_for_bit_and_keeps_the_layout():
    q, k, v = torch.randn(2, 60, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    out = window_attention(q, k, v, size=(6, 10), window=(6, 10))
    want = attend(q, KV(k, v))
    assert torch.equal(out, want)
    assert out.stride() == want.stride()
    assert out.transpose(1, 2).is_contiguous()


def test_extra_keys_share_the_softmax():
    q, k, v = torch.randn(3, 2, 2, 24, 8, dtype=torch.float64).unbind(0)
    text_k, text_v = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64).unbind(0)
    got = window_attention(q, k, v, size=(4, 6), extra=KV(text_k, text_v, temperature=2.0))
    token = torch.arange(24)
    own = token // 6 // 2 * 2 + token % 6 // 3
    want = attend(q, [KV(k, v, mask=own[:, None] == own), KV(text_k, text_v, temperature=2.0)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_composed_path_equals_the_kernel(monkeypatch):
    from transfuse import _backend

    q, k, v = torch.randn(3, 2, 4, 35, 8).unbind(0)
    bias = torch.randn(4, 7, 5)
    options = {"size": (5, 7), "window": (4, 3), "shift": (1, 2), "bias": bias}
    want = {
        wrap: window_attention(q, k[:, :2], v[:, :2], wrap=wrap, **options)
        for wrap in ("cyclic", "mask", "none")
    }
    monkeypatch.setattr(_backend, "choose", lambda *arguments: "composed")
    for wrap, expected in want.items():
        got = window_attention(q, k[:, :2], v[:, :2], wrap=wrap, **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_raw_op_refuses_windows_that_do_not_fit():
    q = torch.randn(1, 2, 12, 4)
    core = ([q], [q], [], [-1], [None], [None], [0.5], [0])
    op = torch.ops.transfuse.attention_forward
    grid = _windows.grid((3, 4), 2, 0)
    op(q, *core, list(grid.numbers(0)))
    for numbers, message in (
        ([2, 3, 4], "windows must hold"),
        ([4, *[2] * 15], "windows must hold"),
        ([2, 3, 5, 2, 2, 0, 0, 0, 0, 0], "windows cover 15"),
        ([2, 3, 4, 0, 2, 0, 0, 0, 0, 0], "window sides >= 1"),
        ([2, 3, 4, 2, 2, 0, 0, 3, 0, 0], "wrap and bias"),
        ([2, 3, 4, 2**20, 2**20, 0, 0, 0, 0, 0], r"fewer than 2\^31"),
        ([2, 3, 4, 2**15, 2**15, 0, 0, 0, 0, 1], r"fewer than 2\^31"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(q, *core, numbers)
    with pytest.raises(RuntimeError, match="one entry per code"):
        op(q, [q], [q], [torch.zeros(1, 2, 1, 15)], [0], *core[4:], list(grid.numbers(1)))


def test_memory_grows_with_the_tokens_only():
    """No map of logits: a window of 64 x 64 tokens would need 64 MiB per head and batch entry."""
    q, k, v = torch.randn(3, 1, 8, 128 * 128, 8).unbind(0)
    with torch.profiler.profile(profile_memory=True) as profile:
        window_attention(q, k, v, size=(128, 128), window=64, shift=16)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated <= 2 * q.numel() * q.element_size()


def test_explain_and_default():
    q = torch.zeros(1, 1, 4, 4)
    assert transfuse.explain("window_attention", q).startswith("window_attention on cpu, float32")
