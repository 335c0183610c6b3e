"""Checkpoints in safetensors files, tensor by tensor: read when asked for, written one at a time.

The format: the length of a JSON header (8 bytes, little endian), the header with dtype, shape and
place of every tensor, and their bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.integrations._require import unusable
from transfuse.methods.model_merging._state_dicts import peek

__all__ = ["LazyStateDict", "merge_files", "write"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class LazyStateDict(Mapping[str, Tensor]):
    """A file as a mapping of names to tensors, each read when it is asked for.

    Args:
        path: a safetensors file.

    Raises:
        ImportError: safetensors is not installed.
        OSError, ValueError: no such file, or one that cannot be read.

    Notes:
        Nothing is kept: asking twice reads twice. Close it, or use it as a context.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder + "/x.safetensors", {"w": torch.ones(2)})
        ...     with LazyStateDict(folder + "/x.safetensors") as state:
        ...         dict(state)
        {'w': tensor([1., 1.])}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except Exception as error:
            raise unusable("safetensors", error) from error
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"path: expected a safetensors file, got {path}: {error}") from error
        self._names = tuple(self._file.keys())

    @property
    def metadata(self) -> dict[str, str]:
        """Texts that the file holds beside its tensors."""
        found = self._file.metadata()
        return {} if found is None else dict(found)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def meta(self, name: str) -> Tensor:
        """Shape and dtype of a tensor, on the meta device; only the header is looked at."""
        if name not in self._names:
            raise KeyError(name)
        part = self._file.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        # A type this module does not know is told by reading it.
        if dtype is None:
            return self[name]
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"LazyStateDict({str(self.path)!r}, {len(self)} tensors)"

    def close(self) -> None:
        """Let the file go."""
        self._file.__exit__(None, None, None)

    def __enter__(self) -> LazyStateDict:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write(
    path: str | os.PathLike[str],
    items: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    like: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file; the whole of it appears under its name at the end, or nothing.

    Args:
        path: the file, replaced if it is there.
        items: a mapping, or names and tensors as they are made, in any order.
        like: names, shapes and dtypes of what ``items`` gives, needed before the first tensor; None
            for a mapping that says it itself.
        metadata: texts to keep beside them.

    Raises:
        TypeError, ValueError: items that do not agree with ``like``, or a dtype the format lacks.
        OSError: the folder cannot be written.

    Notes:
        One tensor is in memory at a time, beside what ``items`` holds. The file is written under a
        temporary name in the same folder, then renamed; if anything fails it is removed, and what
        was there stays.
    """
    if like is None:
        if not isinstance(items, Mapping):
            raise TypeError(f"items: expected a mapping where like is None, got {type(items)}")
        like = items
    pairs = items.items() if isinstance(items, Mapping) else items
    header, places = _header(like, metadata)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            start = file.tell()
            for name, tensor in pairs:
                place = places.pop(name, None)
                if place is None:
                    raise ValueError(f"items: expected names of like, each once, got {name!r}")
                begin, size, shape, dtype = place
                if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                    raise ValueError(
                        f"items: expected {_checks.dtype_name(dtype)} {shape} for {name!r}, got "
                        f"{_checks.describe(tensor)}"
                    )
                file.seek(start + begin)
                if size > 0:
                    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    file.write(flat.numpy().data)
            if places:
                raise ValueError(f"items: expected all names of like, {list(places)[:8]} missing")
            file.flush()
            os.fsync(file.fileno())
        # As open() would have made it; mkstemp is for its owner alone.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _header(
    like: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, tuple[int, int, tuple[int, ...], torch.dtype]]]:
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = {str(k): str(v) for k, v in metadata.items()}
    places, at = {}, 0
    for name in like:
        tensor = peek(like, name)
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name}: expected a dtype of the format, got {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        shape = tuple(tensor.shape)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        places[name] = (at, size, shape, tensor.dtype)
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The data begin at a multiple of 8.
    return text + b" " * (-len(text) % 8), places


def merge_files(
    states: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    fishers: Iterable[str | os.PathLike[str]] | None = None,
    coefficients: Tensor | Iterable[float] | None = None,
    *,
    floor: float = 1e-6,
    favor_target: bool = True,
    normalize: bool = True,
    keep: Iterable[str] = (),
    progress: bool = False,
) -> None:
    """Merge checkpoints in files, a few tensors at a time.

    Args:
        states: safetensors files; the first is the target, whose metadata is kept.
        out: the file to write; it may be one of them.
        fishers: files of Fisher information by name, or None.
        coefficients, floor, favor_target, normalize, keep, progress: see
            ``transfuse.methods.model_merging.fisher_merging.fisher_merge``.

    Raises:
        TypeError, ValueError: as ``fisher_merge``; nothing is written then.
    """
    from contextlib import ExitStack

    from transfuse.methods.model_merging.fisher_merging import iter_merged

    with ExitStack() as stack:
        opened = [stack.enter_context(LazyStateDict(path)) for path in states]
        known = None
        if fishers is not None:
            known = [stack.enter_context(LazyStateDict(path)) for path in fishers]
        given = coefficients
        if given is not None and not isinstance(given, Tensor):
            given = torch.tensor(list(given), dtype=torch.float64)
        items = iter_merged(
            opened,
            known,
            given,
            floor=floor,
            favor_target=favor_target,
            normalize=normalize,
            keep=set(keep),
            progress=progress,
        )
        write(out, items, like=opened[0], metadata=opened[0].metadata)
