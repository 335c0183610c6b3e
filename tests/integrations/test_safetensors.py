"""Merging of files: as in memory, a tensor at a time, and nothing half written."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from transfuse.integrations.safetensors import LazyStateDict, merge_files, write
from transfuse.methods.model_merging import _state_dicts
from transfuse.methods.model_merging.fisher_merging import fisher_merge


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(5, 3, generator=generator), "b": torch.randn(7, generator=generator)}
    states, fishers = [], []
    for k in range(2):
        state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        state["b"] = state["b"].bfloat16()
        state |= {"steps": torch.tensor([k]), "empty": torch.zeros(0, 2)}
        fisher = {n: torch.rand(t.shape, generator=generator) for n, t in base.items()}
        paths = [tmp_path / f"{kind}{k}.safetensors" for kind in ("state", "fisher")]
        save_file(state, paths[0], metadata={"format": "pt", "of": str(k)})
        save_file(fisher, paths[1])
        states.append(paths[0])
        fishers.append(paths[1])
    return states, fishers


def test_files_are_merged_as_in_memory(files, tmp_path, monkeypatch):
    monkeypatch.setattr(_state_dicts, "GROUP", 8)  # one tensor at a time
    states, fishers = files
    out = tmp_path / "out.safetensors"
    merge_files(states, out, fishers, [0.3, 0.7])
    expected = fisher_merge(
        [load_file(p) for p in states], [load_file(p) for p in fishers], [0.3, 0.7]
    )
    found = load_file(out)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    with LazyStateDict(out) as state:
        assert state.metadata["of"] == "0"
    merge_files(states, states[0], fishers, [0.3, 0.7])  # in place of an input
    assert torch.equal(load_file(states[0])["a"], expected["a"])


def test_a_tensor_is_read_once_for_its_values(files, tmp_path, monkeypatch):
    states, fishers = files
    reads = []
    plain = LazyStateDict.__getitem__

    def counted(self, name):
        reads.append((self.path.name, name))
        return plain(self, name)

    monkeypatch.setattr(LazyStateDict, "__getitem__", counted)
    merge_files(states, tmp_path / "out.safetensors", fishers)
    for path, most in ((states[0], 1), (states[1], 1), (fishers[0], 2), (fishers[1], 2)):
        for name in ("a", "b"):
            assert reads.count((path.name, name)) == most, (path.name, name)


def test_nothing_half_written(files, tmp_path):
    states, fishers = files
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    broken = {n: t for n, t in load_file(fishers[1]).items()}
    broken["b"] = -broken["b"]  # noticed when most is written
    save_file(broken, fishers[1])
    there = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="finite numbers of at least 0"):
        merge_files(states, out, fishers)
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == there

    def stops():
        yield "a", torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(out, stops(), like={"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"\['b'\] missing"):
        write(out, [("a", torch.zeros(2))], like={"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"expected float32 \(2,\) for 'a', got a float32"):
        write(out, [("a", torch.zeros(3))], like={"a": torch.zeros(2)})
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == there


def test_refused_files(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not this")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        LazyStateDict(path)
    with pytest.raises(FileNotFoundError):
        LazyStateDict(tmp_path / "none.safetensors")
