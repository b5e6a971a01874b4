"""Where documents come from: what a source is, the `stdlib` source, and the one function that opens any source.

A document is one string, or one conversation. A source whose documents can be read in any order is a
`DocumentSource`; one that can only be read from front to back is a `DocumentStream`. Both give "" for a document that
holds nothing; whoever walks a source skips those, so that an index always means the same document. What a row of a file
or of a dataset is as a document, its `RowField` says.
"""

import os
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from qlatrain.config import DataConfig
from qlatrain.data.conversations import MessagesField, TextOrConversation

SOURCES = ("stdlib", "text", "hf")
# Not the library itself: installed packages, its tests, caches, and the IDLE application.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


class DocumentSource(Protocol):
    """Documents by index. `source[i]` is safe to call from several threads."""

    description: dict  # JSON-able; what says, at a resume, whether this is still the same corpus

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TextOrConversation: ...


class DocumentReader(Protocol):
    """One pass over a `DocumentStream`."""

    def read(self) -> TextOrConversation | None:
        """The next document, or None at the end."""

    def state(self) -> dict:
        """JSON-able: `DocumentStream.open(state)` goes on with the document that `read` would give next."""


class DocumentStream(Protocol):
    """Documents from front to back. Readers do not disturb each other."""

    description: dict

    def open(self, state: dict | None = None) -> DocumentReader: ...


class StdlibSource:
    """The .py files of the running Python's standard library, one document each, by relative path.

    A corpus of about ten million bytes that every machine has: for tests, demonstrations and first runs.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder or sysconfig.get_paths()["stdlib"])
        found = []
        for folder_name, subfolders, names in os.walk(self.folder):
            subfolders[:] = [name for name in subfolders if name not in STDLIB_EXCLUDED]  # site-packages can be huge
            paths = (Path(folder_name, name) for name in names if name.endswith(".py"))
            found += [(path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in paths]
        self.files = sorted((name, size) for name, size in found if size > 0)
        if not self.files:
            raise ValueError(
                f"data.source=stdlib found no .py files in {str(self.folder)!r}; this Python ships its library in "
                "another form, so use data.source=text with data.files."
            )
        self.description = {"source": "stdlib", "files": digest(self.files)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        try:
            return (self.folder / self.files[index][0]).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            return ""  # a file in an old encoding: not ours to repair, so it counts as empty


def digest(value: object) -> str:
    """16 hexadecimal digits that change when `repr(value)` does."""
    return blake2b(repr(value).encode(), digest_size=8).hexdigest()


class RowField(Protocol):
    """Which field of a row holds the document, and how it is read."""

    key: str
    setting: str  # the key of the config that names it
    what: str  # what it holds
    endings: tuple[str, ...]  # files that can hold it
    description: dict  # its part of a source's

    def columns(self, names: list[str]) -> list[str]:
        """Those of the fields `names` that must be read."""

    def document(self, row: dict, place: Callable[[], str]) -> TextOrConversation:
        """The document in `row`, which has the field; ValueError naming `place()` when it cannot be one."""


@dataclass(frozen=True)
class TextField:
    """Rows whose field `key` holds text; null is an empty document."""

    key: str
    setting: str = "data.text_key"
    what: str = "document"
    endings: tuple[str, ...] = (".txt", ".jsonl", ".parquet")

    @property
    def description(self) -> dict:
        return {"text_key": self.key}

    def columns(self, names: list[str]) -> list[str]:
        return [self.key]

    def document(self, row: dict, place: Callable[[], str]) -> str:
        value = row[self.key]
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(
                f"{place()}: field {self.key!r} holds {type(value).__name__}, not text; name the field that holds the "
                "document with data.text_key."
            )
        return value


def check_field(field: RowField, names: Iterable[str], place: Callable[[], str]) -> None:
    """Raises ValueError, naming `place()`, when `names` do not have the field."""
    if field.key not in names:
        raise ValueError(
            f"{place()} has no field {field.key!r}, its fields are {sorted(names)}; "
            f"name the one that holds the {field.what} with {field.setting}."
        )


def open_source(config: DataConfig) -> DocumentSource | DocumentStream:
    """The source that `config.source` names.

    Raises:
        ValueError: the name is unknown, the corpus cannot be opened, or it holds no documents.
    """
    if config.source not in SOURCES:
        raise ValueError(f"data.source={config.source!r} is not known; use one of {', '.join(SOURCES)}.")
    if config.streaming and config.source != "hf":
        raise ValueError(
            f"data.streaming=true works only with data.source=hf, not {config.source!r}; set data.streaming=false."
        )
    conversations = config.format == "conversations"
    field = MessagesField(config.messages_key) if conversations else TextField(config.text_key)
    # The two below import `datasets` and pyarrow, which take a second that the standard library does not need.
    if config.source == "text":
        from qlatrain.data.text_files import TextSource

        return TextSource(list(config.files), field)
    if config.source == "hf":
        from qlatrain.data.huggingface import open_dataset

        return open_dataset(config.dataset, config.dataset_config, config.split, config.streaming, field)
    if conversations:
        raise ValueError("data.source=stdlib holds no conversations; use data.source=text or hf.")
    return StdlibSource()
