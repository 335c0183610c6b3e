"""The alternatives transfuse is measured against, by name.

A peer says which expression of a case it runs (``kind``), how (eagerly, compiled, by another
package) and whether it can run here at all. One that cannot is a row with its reason, never a gap.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..cases import Expression, Unavailable, Workload


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A way to run one kind of expression.

    ``prepare`` turns the case's expression into what is timed; it may raise ``Unavailable``.
    ``package`` is the distribution that must be importable, None for torch itself.
    """

    name: str
    kind: str
    title: str
    prepare: Callable[[Expression, torch.device, str], Expression]
    package: str | None = None
    compiles: bool = False

    def expression(self, workload: Workload, *, device: torch.device, mode: str) -> Expression:
        """What to time for a workload.

        Raises:
            Unavailable: the package is missing, or it cannot express this case.
        """
        if self.package is not None:
            require(self.package)
        if self.kind not in workload.expressions:
            raise Unavailable(f"{self.title} has no expression for this case")
        return self.prepare(workload.expressions[self.kind], device, mode)


def require(package: str) -> None:
    """Raise ``Unavailable`` unless ``package`` imports here."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        top = package.partition(".")[0]
        if error.name in (None, top):
            raise Unavailable(f"not installed: {top}") from None
        raise Unavailable(f"{top} is installed but needs {error.name}, which is not") from None
    except Exception as error:
        raise Unavailable(f"{package} does not import: {type(error).__name__}: {error}") from None


def all_peers() -> dict[str, Peer]:
    """Every known peer by name."""
    from . import third_party, torch_peers

    peers: dict[str, Peer] = {}
    for peer in (*torch_peers.PEERS, *third_party.PEERS):
        if peer.name in peers:
            raise ValueError(f"two benchmark peers are called {peer.name!r}")
        peers[peer.name] = peer
    return peers
