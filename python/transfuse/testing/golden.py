"""Recorded inputs and outputs of official implementations: ``<name>.npz`` with ``<name>.json``.

Arrays are named ``in_<case>__<array>`` and ``out_<case>__<array>``; the JSON file says where they
come from (``source``), what they are (``what``), the parameters of each case (``params``), and the
tolerances they are to be met with (``rtol``, ``atol``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ENVIRONMENT = "TRANSFUSE_GOLDEN"


@dataclass(frozen=True)
class Golden:
    """One recording; :meth:`inputs`, :meth:`outputs` and :meth:`params` select a case of it."""

    name: str
    meta: dict[str, object]
    arrays: dict[str, np.ndarray]

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the cases, in the order recorded."""
        return tuple(dict.fromkeys(_split(key)[1] for key in self.arrays))

    def inputs(self, case: str = "", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Input arrays of a case as tensors, floating ones converted to ``dtype`` if given."""
        return self._select("in", case, dtype)

    def outputs(self, case: str = "", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output arrays of a case as tensors."""
        return self._select("out", case, dtype)

    def params(self, case: str = "") -> object:
        """Parameters as recorded (a mapping in most recordings); an empty one if there are none."""
        params = self.meta["params"]
        return params if case == "" else params.get(case, {})

    def tolerance(self, case: str = "") -> dict[str, float]:
        """``rtol`` and ``atol`` of a case."""
        limits = self.meta.get("tolerances", {}).get(case, self.meta)
        return {"rtol": float(limits["rtol"]), "atol": float(limits["atol"])}

    def check(self, result: Tensor, array: str, case: str = "") -> None:
        """Compare with a recorded output under the recorded tolerances.

        Raises:
            AssertionError: they differ; the message says where and by how much.
        """
        expected = self.outputs(case)[array]
        torch.testing.assert_close(
            result.detach().to(device="cpu", dtype=expected.dtype),
            expected,
            msg=lambda text: f"{self.name}, case {case!r}, {array}: {text}",
            **self.tolerance(case),
        )

    def _select(self, side: str, case: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        found = {}
        for key, array in self.arrays.items():
            own_side, own_case, name = _split(key)
            if (own_side, own_case) == (side, case):
                tensor = torch.from_numpy(array.copy())
                convert = dtype is not None and tensor.is_floating_point()
                found[name] = tensor.to(dtype) if convert else tensor
        if not found:
            raise KeyError(f"{self.name}: no {side} arrays of case {case!r} in {self.cases}")
        return found


def _split(key: str) -> tuple[str, str, str]:
    """``"in_attn__x"`` -> ``("in", "attn", "x")``; ``"in_x"`` -> ``("in", "", "x")``."""
    side, rest = key.split("_", 1)
    case, mark, name = rest.partition("__")
    return (side, case, name) if mark else (side, "", rest)


def load(name: str, directory: str | os.PathLike[str] | None = None) -> Golden:
    """Read a recording.

    Args:
        name: file name without its ending.
        directory: where it lies; None means the first of ``$TRANSFUSE_GOLDEN``, ``tests/golden``
            below the current directory, and ``tests/golden`` of the source tree this package was
            imported from.

    Raises:
        FileNotFoundError: it is in none of these places.
    """
    places = [Path(directory)] if directory is not None else list(_default_places())
    for place in places:
        arrays, meta = place / f"{name}.npz", place / f"{name}.json"
        if arrays.is_file() and meta.is_file():
            with np.load(arrays, allow_pickle=False) as archive:
                return Golden(
                    name,
                    json.loads(meta.read_text(encoding="utf-8")),
                    {key: archive[key] for key in archive.files},
                )
    raise FileNotFoundError(
        f"golden {name!r}: expected {name}.npz and {name}.json in one of "
        f"{', '.join(str(p) for p in places)}"
    )


def _default_places() -> Iterable[Path]:
    if ENVIRONMENT in os.environ:
        yield Path(os.environ[ENVIRONMENT])
    yield Path.cwd() / "tests" / "golden"
    yield Path(__file__).resolve().parents[3] / "tests" / "golden"
