"""Safetensors of a checkpoint folder: one file, or shards with an index; headers first, tensors one at a time."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes, under their safetensors names, that a parameter is read from


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # under its safetensors name

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # of BF16, F8_E4M3, I64; BOOL has a byte
        return math.prod(self.shape) * int(bits[0] if bits else 8) // 8

    def read(self) -> torch.Tensor:
        return next(read_tensors([self]))[1]


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: `load` makes it when its shard is due."""

    name: str
    nbytes: int
    load: Callable[[], torch.Tensor]


def read_headers(folder: Path) -> dict[str, Stored]:
    """Name → tensor, for all files of the checkpoint; no tensor data is read.

    Raises:
        ValueError: not a checkpoint, a pickle instead of safetensors, a shard missing, truncated or unlike the index.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        files, indexed = [SINGLE], None
    elif index.is_file():
        indexed = _read_index(index)
        files = sorted(set(indexed.values()))
    else:
        _refuse_pickles(folder)
        raise ValueError(f"{folder} is not a checkpoint: it needs config.json and {SINGLE} (or {INDEX})")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{index} names {', '.join(missing)}, which {folder} does not hold: copy all of its files")
    found: dict[str, Stored] = {}
    for file in files:
        for stored in _read_header(folder / file):
            found[stored.name] = stored
            if indexed is not None and indexed.get(stored.name) != file:
                raise ValueError(f"{index} does not say that {stored.name} is in {file}: it belongs to other files")
    if indexed is not None and (absent := sorted(indexed.keys() - found.keys())):
        raise ValueError(f"{index} names {', '.join(absent)}, which its files do not hold: it belongs to other files")
    return found


def read_tensors(
    tensors: Iterable[Stored], device: torch.device | str = "cpu"
) -> Iterator[tuple[Stored, torch.Tensor]]:
    """Each tensor with its values on `device`, file by file, each file opened once.

    The host holds the pages of one file, mapped: handed straight to a GPU by safetensors, a tensor would pass through
    page-locked memory of its size besides, which torch keeps.
    """
    by_file: dict[Path, list[Stored]] = {}
    for stored in tensors:
        by_file.setdefault(stored.file, []).append(stored)
    for file, held in by_file.items():
        with _opened(file) as handle:
            for stored in held:
                yield stored, handle.get_tensor(stored.name).to(device)


def write_shards(folder: Path, tensors: list[Pending], max_shard_bytes: int) -> None:
    """Writes one file, or as many shards as it takes for none to be larger, and an index.

    A single tensor above the limit has a shard of its own. Weights that an earlier checkpoint left in the folder go.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(x.nbytes for x in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        save_file({x.name: x.load() for x in shard}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {x.name: name for name, shard in zip(names, shards, strict=True) for x in shard}
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        names.append(INDEX)
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / SINGLE, folder / INDEX):
        if old.name not in names:
            old.unlink(missing_ok=True)


def _read_header(file: Path) -> list[Stored]:
    with _opened(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        return [Stored(name, file, tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()]


def _opened(file: Path):
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(Path(file).name == file and file.endswith(".safetensors") for file in weight_map.values()):
            raise ValueError("weight_map must name .safetensors files beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {error}") from error
    return weight_map


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds {', '.join(pickles)} and no safetensors: a pickle can run code when it is opened, and is "
            "not read; save the model again with transformers' save_pretrained"
        )
