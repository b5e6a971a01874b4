"""`metrics.jsonl`: one JSON object a line, the record of a run that every plot and table is made from.

Keys, all optional but `step`: `loss` (nats per token), `lr`, `grad_norm`, `tokens` (so far), `tokens_per_second`,
`mfu` (0..1), `validation_loss` (nats per token), `validation_bits_per_byte`, `bigram_bits_per_byte`, and what
`KernelTimes.row` gives. A recipe may add its own. JSON knows no NaN, so a number that is not finite is written as null,
with its name under `nonfinite`: `{"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}`.
"""

import json
import math
import os
from pathlib import Path
from typing import TextIO


class MetricsWriter:
    """Appends rows to a metrics file, each flushed as it is written.

    resumed_step: None begins the file anew. A number continues it: rows of later steps are dropped, because the run
        is about to do those steps again, and so is a last line torn by a kill. The kept rows are written aside and
        renamed, so that a kill here loses nothing. A missing file is begun.

    Use on the main process only. Also a context manager.
    """

    def __init__(self, path: str | Path, resumed_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resumed_step is not None and self.path.exists():
            kept = [row for row in _parsed_rows(self.path) if row["step"] <= resumed_step]
        aside = self.path.with_name(self.path.name + ".new")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Writes one row. Values are numbers, text, booleans or None; scalars of numpy and torch are converted.

        Raises `ValueError` for a row without an integer `step` or with a value that is no scalar.
        """
        self._file.write(_line(_plain_row(row)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics file in the order written; non-finite numbers are floats again.

    A torn last line is left out. Raises `ValueError` for any other line that is not a row.
    """
    rows = _parsed_rows(Path(path))
    for row in rows:
        row.update({key: float(text) for key, text in row.pop("nonfinite", {}).items()})
    return rows


def _line(plain_row: dict) -> str:
    return json.dumps(plain_row, allow_nan=False, ensure_ascii=False) + "\n"


def _plain_row(row: dict) -> dict:
    """The row as JSON can hold it."""
    plain, nonfinite = {}, {}
    for key, value in row.items():
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
            value = value.item()
        if value is not None and not isinstance(value, bool | int | float | str):
            raise ValueError(f"metric {key!r} is {value!r}; a metrics row holds numbers, text, booleans and None only")
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite[key], value = str(value), None
        plain[key] = value
    if not _has_step(plain):
        raise ValueError(f"a metrics row needs an integer 'step', got {plain.get('step')!r}")
    return plain | ({"nonfinite": nonfinite} if nonfinite else {})


def _has_step(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)


def _parsed_rows(path: Path) -> list[dict]:
    """The rows as they stand in the file, without a torn last line."""
    # bytes, because a kill can tear a line in the middle of a character
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: torn
                break
            raise ValueError(f"{path}, line {number} is not a metrics row: {line[:80]!r}") from error
        if not _has_step(row):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} has no integer 'step': {line[:80]!r}")
        rows.append(row)
    return rows
