"""The shape of a batch, rows and tokens, and that of a call, with heads and head sizes: as written and as numbers."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from qlatrain.bench.model_options import read_model

HEAD_DIM = 128  # K and V where a shape does not name them
GRAMMAR = "write B×T Hk/Hv or T packedN Hk/Hv, then K/V unless both are 128: 8x4096 16/32, 32768 packed16 16/32 96/192"
BATCH_GRAMMAR = "write B×T or T packedN: 2x4096, 32768 packed16"
_ROWS = r"(?:(\d+)[x×](\d+)|(\d+) +packed(\d+))"
_BATCH = re.compile(_ROWS)
_SHAPE = re.compile(_ROWS + r" +(\d+)/(\d+)(?: +(\d+)/(\d+))?")


@dataclass(frozen=True)
class BatchShape:
    """`batch` rows of `tokens`, or one row of `tokens` into which `documents` are packed."""

    batch: int
    tokens: int
    documents: int | None = None

    @property
    def all_tokens(self) -> int:
        return self.batch * self.tokens

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}" if self.documents is None else f"{self.tokens} packed{self.documents}"

    @property
    def slug(self) -> str:
        """The shape in a name that may hold no space: `32768_packed16`."""
        return str(self).replace(" ", "_")

    def bounds(self, seed: int) -> list[int] | None:
        """Boundaries of the packed documents, `documents` + 1 of them, lengths at random; None for a dense batch."""
        if self.documents is None:
            return None
        cuts = random.Random(seed).sample(range(1, self.tokens), self.documents - 1)
        return [0, *sorted(cuts), self.tokens]


@dataclass(frozen=True)
class Shape:
    """`batch` rows of `tokens`, or one row of `tokens` into which `documents` are packed."""

    batch: int
    tokens: int
    key_heads: int
    value_heads: int
    key_dim: int = HEAD_DIM
    value_dim: int = HEAD_DIM
    documents: int | None = None

    @property
    def rows(self) -> BatchShape:
        return BatchShape(self.batch, self.tokens, self.documents)

    @property
    def all_tokens(self) -> int:
        return self.rows.all_tokens

    @property
    def group(self) -> float:
        """Value heads to a key head."""
        return self.value_heads / self.key_heads

    def __str__(self) -> str:
        dims = "" if self.key_dim == self.value_dim == HEAD_DIM else f" {self.key_dim}/{self.value_dim}"
        return f"{self.rows} {self.key_heads}/{self.value_heads}{dims}"

    @property
    def slug(self) -> str:
        """The shape in a name that may hold no space and no slash: `8x4096_16-32`."""
        return str(self).replace(" ", "_").replace("/", "-")

    def bounds(self, seed: int) -> list[int] | None:
        """As of `BatchShape`."""
        return self.rows.bounds(seed)


def parse_batch(text: str, key: str = "bench.shape") -> BatchShape:
    """Reads `2x4096` or `32768 packed16`.

    Raises:
        ValueError: anything else, and batches that cannot be; `key` is named as the place of the mistake.
    """
    match = _BATCH.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{key}={text} is no batch: {BATCH_GRAMMAR}")
    batch, dense, packed, documents = (None if found is None else int(found) for found in match.groups())
    shape = BatchShape(batch, dense) if packed is None else BatchShape(1, packed, documents)
    if 0 in (shape.batch, shape.tokens, shape.documents):
        raise ValueError(f"{key}={text} has a size of 0: {BATCH_GRAMMAR}")
    if documents is not None and documents > shape.tokens:
        raise ValueError(f"{key}={text}: {documents} documents need at least {documents} tokens")
    if shape.tokens < 2 or shape.tokens == documents:
        raise ValueError(f"{key}={text} has no token that another one predicts: make it longer")
    return shape


def parse_shape(text: str, key: str = "bench.shapes") -> Shape:
    """Reads `8x4096 16/32`, `32768 packed16 16/32`, either with K and V behind: `8x4096 16/16 96/192`.

    Raises:
        ValueError: anything else, and shapes that cannot be; `key` is named as the place of the mistake.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{key} holds {text!r}, which is no shape: {GRAMMAR}")
    batch, dense, packed, documents, key_heads, value_heads, key_dim, value_dim = (
        None if found is None else int(found) for found in match.groups()
    )
    shape = Shape(
        batch=1 if batch is None else batch,
        tokens=packed if dense is None else dense,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=HEAD_DIM if key_dim is None else key_dim,
        value_dim=HEAD_DIM if value_dim is None else value_dim,
        documents=documents,
    )
    sizes = (shape.batch, shape.tokens, key_heads, value_heads, shape.key_dim, shape.value_dim)
    if 0 in sizes or documents == 0:
        raise ValueError(f"{key} holds {text!r}, in which a size is 0: {GRAMMAR}")
    if value_heads % key_heads:
        raise ValueError(f"{key} holds {text!r}, whose {value_heads} value heads are no multiple of {key_heads}")
    if documents is not None and documents > shape.tokens:
        raise ValueError(f"{key} holds {text!r}: {documents} documents need at least {documents} tokens")
    return shape


def shape_of_model(folder: Path, name: str, tokens: int, batch: int, documents: int | None) -> Shape:
    """The call that a Gated DeltaNet layer of a model makes for a batch.

    Args:
        folder: of model configs, one YAML for each.
        name: of one of them.
        tokens: of the whole batch.
        batch: rows that they are cut into.
        documents: packed into the one row, or None.

    Raises:
        ValueError: there is no such model.
    """
    model = read_model(folder, name, "bench.from_model")
    return Shape(
        batch=batch,
        tokens=tokens // batch,
        key_heads=model.linear_num_key_heads,
        value_heads=model.linear_num_value_heads,
        key_dim=model.linear_key_head_dim,
        value_dim=model.linear_value_head_dim,
        documents=documents,
    )
