"""The small claim of lr_transfer: sharpness along training of digits, over widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transfuse.methods.optimization.lr_transfer import MeanFieldOptions, transfer_report

ETA = 0.5


def curves(mode: str) -> list[torch.Tensor]:
    """gamma^2-sharpness before and after 160 steps of gradient descent, widths 64 and 256."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.from_numpy(digits.data[:256]).float() / 16
    y = F.one_hot(torch.from_numpy(digits.target[:256]), 10).float()
    report = transfer_report(
        x,
        y,
        widths=[64, 256],
        depths=[2],
        lrs=[ETA],
        options=MeanFieldOptions(mode=mode, alpha=0.5),
        steps=160,
        every=160,
    )
    return [run.sharpness for run in report.runs]


@pytest.mark.claim
def test_sharpness_grows_to_the_same_plateau_under_mup_and_not_under_ntp():
    mup, ntp = curves("depth_mup"), curves("ntp")
    print("muP", [c.tolist() for c in mup], "NTP", [c.tolist() for c in ntp])
    for curve in mup:
        assert curve[-1] / curve[0] >= 1.5
        # It stops growing at the edge of stability, around which it swings.
        assert curve[-1] < 1.15 * 2 / ETA
    narrow, wide = (curve[-1] for curve in mup)
    assert abs(narrow - wide) <= 0.2 * max(narrow, wide)
    for curve in ntp:
        assert curve[-1] / curve[0] <= 1.1
