"""Loading of the compiled library: what is said when it is missing or does not fit, and ``_C``."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest
import torch

import transfuse
from transfuse import _native
from transfuse.ops import KV, attend

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."

USE = """
import warnings
import torch
from transfuse import _native, explain
from transfuse.ops import KV, attend

q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
expected = attend(q, KV(k, v), backend="reference")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = attend(q, KV(k, v))
    attend(q, KV(k, v))
torch.testing.assert_close(first, expected)
print(len(caught), "warning:", caught[0].message)
print("status:", _native.status().loaded, _native.status().reason)
for attempt in (lambda: attend(q, KV(k, v), backend="cpu"), _native.require):
    try:
        attempt()
    except RuntimeError as error:
        print(type(error).__name__, error)
q.requires_grad_()
attend(q, KV(k, v)).sum().backward()
print("gradient", tuple(q.grad.shape))
print(explain("attend", q))
"""


def test_without_the_binary(run_code, run_python, bare_package):
    """Ops run on eager torch, one warning and every error name the way to rebuild."""
    text = run_code(USE, PYTHONPATH=str(bare_package))
    assert text.startswith("1 warning: transfuse runs without its CPU kernels: the compiled")
    assert "status: False the compiled library is not installed" in text
    assert "RuntimeError attend: backend 'cpu' cannot run: the compiled library is not" in text
    assert "NativeUnavailableError transfuse's CPU kernels are unavailable" in text
    assert text.count(REBUILD) >= 4
    assert "gradient (1, 2, 5, 8)" in text
    info = run_python("-m", "transfuse.info", PYTHONPATH=str(bare_package))
    assert info.returncode == 0, info.stderr
    assert "not loaded: the compiled library is not installed" in info.stdout
    assert str(bare_package) in info.stdout


def test_level_that_cannot_run(run_code, run_python):
    text = run_code(USE, TRANSFUSE_CPU_ISA="nonsense")
    assert "TRANSFUSE_CPU_ISA=nonsense cannot run here: this build and processor offer" in text
    assert "portable" in text
    assert "RuntimeError attend: backend 'cpu' cannot run" in text
    info = run_python("-m", "transfuse.info", TRANSFUSE_CPU_ISA="nonsense")
    assert info.returncode == 0, info.stderr
    assert "none: TRANSFUSE_CPU_ISA=nonsense" in info.stdout


def _fake(monkeypatch, tmp_path, version: str) -> None:
    module = types.ModuleType("transfuse._C")
    module.__file__ = str(tmp_path / "_C.so")
    module.build_info = lambda: {"version": version}
    module.isa_in_use = lambda: "portable"
    monkeypatch.setitem(sys.modules, "transfuse._C", module)


def test_binary_of_another_version(monkeypatch, tmp_path):
    _fake(monkeypatch, tmp_path, "9.9.9")
    state = _native._load()
    assert not state.loaded
    assert "the compiled library is version 9.9.9, the Python package" in state.reason
    assert transfuse.__version__ in state.reason
    assert REBUILD in state.reason


def test_binary_that_does_not_load(monkeypatch, tmp_path):
    _fake(monkeypatch, tmp_path, transfuse.__version__)
    (tmp_path / "_ops.so").write_bytes(b"not a library")
    state = _native._load()
    assert not state.loaded
    assert f"does not fit torch {torch.__version__}" in state.reason
    assert REBUILD in state.reason


def test_broken_extension_module(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: nothing")

    monkeypatch.setattr(_native.importlib, "import_module", fail)
    state = _native._load()
    assert not state.loaded
    assert "transfuse._C cannot be loaded (undefined symbol: nothing)" in state.reason
    assert REBUILD in state.reason


native = pytest.mark.skipif(not _native.status().loaded, reason="CPU kernels are not loaded")

LEVEL = """
import torch
from transfuse import _native
from transfuse.ops import KV, attend

_native.require()
generator = torch.Generator().manual_seed(0)
for dtype, band in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)):
    q, k, v = torch.randn(3, 2, 3, 70, 40, generator=generator, dtype=torch.float64).to(dtype)
    out = attend(q, KV(k, v, causal="upper_left"), backend="cpu")
    wide = KV(k.double(), v.double(), causal="upper_left")
    expected = attend(q.double(), wide, backend="reference")
    assert (out.double() - expected).abs().max() < band, dtype
import transfuse._C
print(transfuse._C.isa_in_use())
"""


@native
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16", "emulated512"])
def test_every_level_can_be_forced(run_code, level):
    supported = {
        e["name"] for e in importlib.import_module("transfuse._C").isa_report() if e["supported"]
    }
    if level not in supported:
        pytest.skip(f"this processor or build has no {level}")
    assert run_code(LEVEL, TRANSFUSE_CPU_ISA=level).strip() == level


@native
class TestRawEntryPoints:
    @pytest.fixture
    def module(self):
        return importlib.import_module("transfuse._C")

    def test_report(self, module):
        build = module.build_info()
        assert build["version"] == transfuse.__version__
        assert build["torch_abi_target"] == "2.10"
        levels = {level["name"]: level for level in module.isa_report()}
        assert levels["portable"]["supported"]
        assert levels["emulated512"]["supported"]
        assert all(level["compiled"] for level in levels.values() if level["supported"])
        assert levels[module.isa_in_use()]["supported"]

    @pytest.mark.parametrize("threads", [1, 2])
    def test_attention_of_arrays(self, module, threads):
        random = np.random.default_rng(0)
        q = random.standard_normal((2, 4, 33, 24)).astype(np.float32)
        k, v = random.standard_normal((2, 2, 2, 41, 24)).astype(np.float32)
        out = module.attend_float32(q, k, v, threads=threads)
        expected = attend(
            *(torch.from_numpy(x) for x in (q,)), KV(torch.from_numpy(k), torch.from_numpy(v))
        )
        np.testing.assert_allclose(out, expected.numpy(), atol=2e-6)
        every_other = module.attend_float32(q[:, :, ::2], k, v, threads=threads)
        np.testing.assert_array_equal(every_other, out[:, :, ::2])

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((2, 3), (1, 1, 2, 3), (1, 1, 2, 3)), "must have 4 axes"),
            (((1, 1, 2, 3), (1, 1, 2, 4), (1, 1, 2, 3)), "do not fit together"),
            (((1, 1, 2, 3), (2, 1, 2, 3), (2, 1, 2, 3)), "do not fit together"),
            (((1, 3, 2, 3), (1, 2, 2, 3), (1, 2, 2, 3)), "do not fit together"),
            (((1, 1, 2, 300), (1, 1, 2, 300), (1, 1, 2, 3)), "do not fit together"),
        ],
    )
    def test_wrong_arrays_are_refused(self, module, shapes, message):
        arrays = [np.zeros(shape, np.float32) for shape in shapes]
        with pytest.raises(ValueError, match=message):
            module.attend_float32(*arrays)
        with pytest.raises(ValueError, match="threads must be at least 1"):
            module.attend_float32(*[np.zeros((1, 1, 2, 3), np.float32)] * 3, threads=0)
