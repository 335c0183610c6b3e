"""The small claims of HiDiffusion: windows are a block mask, and when RAU-Net acts."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.diffusion_control.hi_diffusion import msw_shift, rau_schedule
from transfuse.ops import window_attention, window_partition, window_reverse


@pytest.mark.claim
@pytest.mark.parametrize("size", [(16, 24), (15, 24), (13, 9), (6, 16), (5, 1)])
@pytest.mark.parametrize("index", range(4))
def test_windows_are_global_attention_under_a_block_mask(size, index):
    generator = torch.Generator().manual_seed(0)
    tokens = size[0] * size[1]
    query, key, value = torch.randn(3, 2, 3, tokens, 8, generator=generator).unbind(0)
    (height, width), (down, right) = size, msw_shift(size, index)
    y, x = torch.arange(height)[:, None], torch.arange(width)
    window = 2 * ((y - down) % height // -(-height // 2)) + (x - right) % width // -(-width // 2)
    mask = window.flatten()[:, None] == window.flatten()
    full = [t.double() for t in (query, key, value)]
    scores = full[0] @ full[1].mT / 8**0.5
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ full[2]
    out = window_attention(query, key, value, size=size, shift=(down, right))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert mask.sum(1).max() <= -(-height // 2) * -(-width // 2)


@pytest.mark.claim
@pytest.mark.parametrize("index", range(4))
def test_cutting_and_putting_back_is_the_identity(index):
    x = torch.randn(2, 16 * 24, 5, generator=torch.Generator().manual_seed(0))
    where = {"size": (16, 24), "shift": msw_shift((16, 24), index)}
    assert torch.equal(window_reverse(window_partition(x, **where), **where), x)


# model, latent, options -> {steps: (strided, pooled)}, worked out by hand from int(steps * ratio)
TABLE = [
    ("sd15", (128, 128), {}, {10: ((0, 4), ()), 25: ((0, 10), ()), 50: ((0, 20), ())}),
    ("sd21", (255, 512), {}, {10: ((0, 4), ()), 25: ((0, 10), ()), 50: ((0, 20), ())}),
    (
        "sd15",
        (256, 256),
        {},
        {10: ((0, 7), (0, 3)), 25: ((0, 17), (0, 7)), 50: ((0, 35), (0, 15))},
    ),
    (
        "sdxl",
        (256, 256),
        {},
        {10: ((0, 1), (1, 4)), 25: ((0, 4), (4, 10)), 50: ((0, 8), (8, 20))},
    ),
    (
        "sdxl",
        (511, 900),
        {"aggressive": False},
        {10: ((), (0, 4)), 25: ((), (0, 10)), 50: ((), (0, 20))},
    ),
    (
        "sdxl",
        (256, 256),
        {"aggressive": False, "controlnet": True},
        {10: ((), (0, 5)), 25: ((), (0, 12)), 50: ((), (0, 25))},
    ),
    (
        "sdxl",
        (512, 512),
        {},
        {10: ((0, 3), (0, 7)), 25: ((0, 7), (0, 17)), 50: ((0, 15), (0, 35))},
    ),
    ("sdxl_turbo", (128, 128), {}, {10: ((), (0, 5)), 25: ((), (0, 12)), 50: ((), (0, 25))}),
]


@pytest.mark.claim
@pytest.mark.parametrize(("model", "latent", "options", "rows"), TABLE)
def test_the_table_of_steps(model, latent, options, rows):
    for steps, expected in rows.items():
        schedule = rau_schedule(model, latent, steps, **options)
        for acting, bounds in zip((schedule.strided, schedule.pooled), expected, strict=True):
            assert list(acting) == list(range(*bounds)) if bounds else not acting


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    gallery = pytest.importorskip("transfuse.bench.gallery.hi_diffusion", exc_type=ImportError)
    path = tmp_path / "hi_diffusion.png"
    if gallery.main(["--out", str(path), "--size", "12", "17"]) == 2:
        pytest.skip("the photographs are not available")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--size", "4", "40"])
