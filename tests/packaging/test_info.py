"""``python -m transfuse.info``."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import torch

import transfuse
from transfuse import _native, info


def test_sections():
    facts = info.collect()
    assert facts["versions"]["transfuse"] == transfuse.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert {"reference", "cpu", "triton"} <= set(facts["ops"]["attend"])
    assert "style_injection" in facts["methods"]["names"]
    assert facts["methods"]["count"] == len(facts["methods"]["names"])
    assert json.loads(json.dumps(facts)) == facts
    if _native.status().loaded:
        assert facts["isa"]["in use"] in facts["isa"]["supported"]
        assert set(facts["isa"]["supported"]) <= set(facts["isa"]["compiled"])
        assert facts["libraries"]["CPU ops"].startswith("loaded from ")
        assert facts["libraries"]["built version"] == transfuse.__version__


def test_text_and_json(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for section in info.collect():
        assert f"{section}\n" in text
    assert f"{torch.__version__}" in text
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"] == torch.__version__


def test_optional_packages_come_from_the_metadata(monkeypatch):
    facts = info.collect()["optional"]
    assert {"triton", "diffusers", "rich", "matplotlib"} <= set(facts)
    assert "transfuse" not in facts

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(info.importlib.metadata, "version", missing)
    assert info.collect()["optional"]["diffusers"] == "not installed (extra transfuse[diffusers])"
    assert info.collect()["gpu"]["Triton"].startswith("not installed")


@pytest.mark.parametrize("value", [None, "portable"])
def test_environment(monkeypatch, value):
    monkeypatch.delenv("TRANSFUSE_CPU_ISA", raising=False)
    if value is not None:
        monkeypatch.setenv("TRANSFUSE_CPU_ISA", value)
    assert info.collect()["environment"]["TRANSFUSE_CPU_ISA"] == value


def test_every_variable_that_is_read_is_reported():
    """A TRANSFUSE_ variable named anywhere in the package is in the list, but for private ones."""
    private = {"TRANSFUSE_BENCH_RESTARTED"}
    found = set()
    for path in Path(transfuse.__file__).parent.rglob("*.py"):
        found |= set(
            re.findall(r"[\"'`](TRANSFUSE_[A-Z_]+)[\"'`]", path.read_text(encoding="utf-8"))
        )
    assert found - private <= set(info.ENVIRONMENT)
    assert "TRANSFUSE_TRITON_CONFIG" in found


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        info.main(["--nonsense"])
    assert stopped.value.code == 2
    assert "--nonsense" in capsys.readouterr().err
