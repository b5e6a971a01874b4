"""Documents in the user's own files: .txt (one document a file), .jsonl (one a line), .parquet (one a row).

A document is text or, in .jsonl and .parquet, a conversation.

Nothing is held in memory but where each document begins: a jsonl line is found by its byte offset, and parquet
is converted once, by `datasets`, to a memory-mapped table in its cache, since a parquet file can only be read a
whole row group at a time.
"""

import glob
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from qlatrain.data.conversations import TextOrConversation, without_nulls
from qlatrain.data.sources import RowField, check_field, digest

SCAN_BYTES = 1 << 24  # of a jsonl file at a time, when its lines are indexed


class TextSource:
    """The documents of `files`, in the order of `files`; the matches of one glob are sorted.

    Args:
        files: paths or globs; `~` and `**` are understood. A file named twice is read once.
        field: the field of .jsonl and .parquet rows that holds the document.

    Raises:
        ValueError: a file is missing, a glob matches nothing, an ending is unknown, a row has no such field, or
            there are no documents. Rows after the first of a file are looked at when they are read.
    """

    def __init__(self, files: list[str], field: RowField):
        if not files:
            endings = ", ".join(field.endings)
            raise ValueError(f"data.source=text needs data.files: a list of paths or globs of {endings}.")
        openers = {".txt": lambda path, _: TxtFile(path), ".jsonl": JsonlFile, ".parquet": ParquetFile}
        self.parts = [openers[path.suffix](path, field) for path in expand(files, field)]
        self.ends = np.cumsum([len(part) for part in self.parts])
        if not len(self):
            raise ValueError(f"data.files={files} hold no documents: every file is empty.")
        # Names without folders: a corpus that was moved is still the same corpus.
        sizes = [(part.path.name, part.path.stat().st_size) for part in self.parts]
        self.description = {"source": "text", "files": digest(sizes), **field.description}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> TextOrConversation:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]


def expand(files: list[str], field: RowField) -> list[Path]:
    """The paths that `files` (paths and globs) mean, each once; errors as in `TextSource`."""
    paths: dict[str, Path] = {}
    for pattern in files:
        expanded = os.path.expanduser(pattern)
        if os.path.exists(expanded):  # first, so that a file with a [ in its name can be named
            found = [expanded]
        elif glob.has_magic(expanded):
            found = sorted(name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
            if not found:
                raise ValueError(f"data.files: {pattern!r} matches no file; check the folder and the pattern.")
        else:
            raise ValueError(f"data.files: {pattern!r} does not exist; check the path (relative to {os.getcwd()!r}).")
        for name in found:
            if os.path.isdir(name):
                example = f"{pattern.rstrip('/')}/**/*{field.endings[0]}"
                raise ValueError(f"data.files: {pattern!r} is a folder; name its files, e.g. {example!r}.")
            if Path(name).suffix not in field.endings:
                raise ValueError(
                    f"data.files: {name!r} ends in none of {', '.join(field.endings)}; convert or rename it."
                )
            paths.setdefault(os.path.realpath(name), Path(name))
    return list(paths.values())


def decode(content: bytes, place: Callable[[], str]) -> str:
    """UTF-8 text with its line endings as they are; ValueError naming `place()` and the first bad byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place()} is not UTF-8 at byte {error.start}; convert it to UTF-8.") from error


class TxtFile:
    """One document, or none when the file has no bytes."""

    def __init__(self, path: Path):
        self.path = path
        self.length = int(path.stat().st_size > 0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        return decode(self.path.read_bytes(), partial(str, self.path))


class JsonlFile:
    """One document a line; empty lines are not documents. Holds 16 bytes a line in memory."""

    def __init__(self, path: Path, field: RowField):
        self.path = path
        self.field = field
        self.starts, self.ends = line_spans(path)
        if len(self):
            self[0]  # a wrong field is met now rather than in the middle of a run

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> TextOrConversation:
        start, end = int(self.starts[index]), int(self.ends[index])
        with open(self.path, "rb") as file:  # opened each time: threads share no file position
            file.seek(start)
            line = file.read(end - start)
        if line.isspace():
            return ""
        place = partial(self._place, start)
        try:
            row = json.loads(decode(line, place))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place()} is not JSON: {error.msg} at column {error.colno}; "
                "mend it, every line must be one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{place()} is a JSON {type(row).__name__}; every line must be a JSON object.")
        check_field(self.field, row, place)
        return self.field.document(row, place)

    def _place(self, start: int) -> str:
        """`file:line` of the line that begins at byte `start`; counted only when there is an error to report."""
        with open(self.path, "rb") as file:
            lines, left = 1, start
            while left and (chunk := file.read(min(SCAN_BYTES, left))):
                lines += chunk.count(b"\n")
                left -= len(chunk)
        return f"{self.path}:{lines}"


def line_spans(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets where the lines of `path` begin and end (without the newline), int64; empty lines left out."""
    newlines, at = [], 0
    with open(path, "rb") as file:
        while chunk := file.read(SCAN_BYTES):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + at)
            at += len(chunk)
    ends = np.concatenate([*newlines, np.array([at])]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1] + 1])
    filled = ends > starts
    return starts[filled], ends[filled]


class ParquetFile:
    """One document a row."""

    def __init__(self, path: Path, field: RowField):
        import pyarrow as pa
        import pyarrow.parquet
        from datasets import Dataset
        from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

        self.path = path
        self.field = field
        try:
            names = pa.parquet.read_schema(path).names
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a parquet file that can be read: {first_line(error)}") from error
        check_field(field, names, partial(str, path))
        shown = is_progress_bar_enabled()
        disable_progress_bar()
        try:
            self.rows = Dataset.from_parquet(str(path), columns=field.columns(names))
        finally:
            if shown:
                enable_progress_bar()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TextOrConversation:
        return self.field.document(table_row(self.rows[index], self.field), lambda: f"{self.path}, row {index}")


def table_row(row: dict, field: RowField) -> dict:
    """What `field` reads of a row of a table, without the keys inside it that hold null."""
    return {name: without_nulls(row[name]) for name in field.columns(list(row))}


def first_line(error: BaseException) -> str:
    """What an error says, in one line: for the sentence that reports it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
