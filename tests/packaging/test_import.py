"""What ``import transfuse`` does, and above all what it does not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import transfuse

# Loaded by nobody who only calls ops.
HEAVY = (
    "triton", "matplotlib", "rich", "diffusers", "transformers", "safetensors", "sklearn", "scipy",
    "PIL", "hypothesis", "pytest",
)  # fmt: skip
LATER = ("transfuse.methods", "transfuse.testing", "transfuse.integrations", "transfuse.bench")

STATE = """
import json, sys
import torch

def state():
    return dict(
        threads=torch.get_num_threads(),
        interop=torch.get_num_interop_threads(),
        dtype=str(torch.get_default_dtype()),
        device=str(torch.get_default_device()),
        grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        precision=torch.get_float32_matmul_precision(),
        mkldnn=torch.backends.mkldnn.enabled,
        benchmark=torch.backends.cudnn.benchmark,
        denormal=(torch.tensor(1e-38) * 1e-3).item(),
        seed=torch.initial_seed(),
        draw=torch.get_rng_state().sum().item(),
        anomaly=torch.is_anomaly_enabled(),
        allocator=torch.cuda.is_initialized(),
    )

torch.manual_seed(3)
before, known = state(), set(sys.modules)
import transfuse
after_package = set(sys.modules) - known
import transfuse.ops
print(json.dumps([before, state(), sorted(after_package), sorted(set(sys.modules) - known)]))
"""


def test_importing_is_light_and_changes_nothing(run_code):
    before, after, package, ops = json.loads(run_code(STATE))
    assert after == before
    ours = [name for name in package if name.split(".")[0] == "transfuse"]
    assert ours == ["transfuse"]
    assert not [name for name in ops if name.split(".")[0] in HEAVY]
    assert not [name for name in ops if name.startswith(LATER)]


def test_everything_listed_can_be_had():
    for name in transfuse.__all__:
        assert getattr(transfuse, name) is not None
    assert dir(transfuse) == sorted(transfuse.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = transfuse.nonsense


def test_package_ships_its_parts():
    folder = Path(transfuse.__file__).parent
    for part in ("py.typed", "info.py", "triton_kernels/__init__.py", "bench/__main__.py"):
        assert (folder / part).is_file(), part
    assert not (folder / "tests").exists()
