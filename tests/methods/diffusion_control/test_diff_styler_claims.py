"""The small claims of DiffStyler: what is shared between thirds and what is not, and where."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.diffusion_control.diff_styler import (
    fuse_noise,
    inject_features,
    injected_self_attention,
)


@pytest.fixture
def thirds():
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 4, 49, 16, generator=g).unbind()  # n = 2, three thirds


def maps(query, key, rate):
    """Attention maps: the values are the unit vectors."""
    units = torch.eye(49).expand(6, 4, -1, -1).contiguous()
    return injected_self_attention(query, key, units, rate=rate, n_source=2)


@pytest.mark.claim
def test_full_rate_shares_maps_and_not_values(thirds):
    q, k, v = thirds
    source, free, conditional = maps(q, k, 1.0).chunk(3)
    assert (free - source).abs().max() < 1e-6
    assert (conditional - source).abs().max() < 1e-6
    out = injected_self_attention(q, k, v, rate=1.0, n_source=2)
    torch.testing.assert_close(out, maps(q, k, 1.0) @ v, rtol=1e-4, atol=1e-5)
    assert (out[2:4] - out[:2]).abs().max() > 0.1, "values must stay own"
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    none = injected_self_attention(q, k, v, rate=0.0, n_source=2)
    torch.testing.assert_close(none, plain, rtol=1e-4, atol=1e-5)
    half = maps(q, k, 0.5)[2:4]
    after = 0.5 * maps(q, k, 1.0)[2:4] + 0.5 * maps(q, k, 0.0)[2:4]
    assert (half - after).abs().max() > 1e-2, "a blend after the softmax is another method"


@pytest.mark.claim
def test_noise_is_the_base_outside_and_the_last_style_inside():
    g = torch.Generator().manual_seed(1)
    base, *styled = torch.randn(4, 2, 4, 16, 16, generator=g).unbind()
    masks = torch.rand(3, 16, 16, generator=g) > 0.6
    out = fuse_noise(base, styled, masks)
    outside = ~masks.any(0)
    assert torch.equal(out[..., outside], base[..., outside])
    last = torch.where(masks[2], 2, torch.where(masks[1], 1, torch.where(masks[0], 0, -1)))
    for number, one in enumerate(styled):
        assert torch.equal(out[..., last == number], one[..., last == number])
    assert all((last == number).any() for number in (-1, 0, 1, 2))


@pytest.mark.claim
def test_features_change_the_residual_branch_alone():
    g = torch.Generator().manual_seed(2)
    shortcut, hidden = torch.randn(2, 6, 8, 5, 5, generator=g).unbind()
    out = shortcut + inject_features(hidden, n_source=2)
    branch = out - shortcut
    for third in branch.chunk(3):
        torch.testing.assert_close(third, hidden[:2], rtol=0, atol=1e-6)
    assert (out[2:4] - out[:2]).abs().max() > 0.1, "shortcuts stay own"


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    gallery = pytest.importorskip("transfuse.bench.gallery.diff_styler", exc_type=ImportError)
    path = tmp_path / "diff_styler.png"
    try:
        content, own = (gallery.tokens(name, (12, 16)) for name in ("china", "flower"))
    except gallery.Unavailable as reason:
        pytest.skip(str(reason))
    far = [gallery.distance_of_maps(content, own, rate) for rate in (0.0, 0.5, 1.0)]
    assert min(far[:2]) > 0.01
    assert far[2] == 0.0
    assert gallery.main(["--out", str(path), "--size", "12", "16"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
