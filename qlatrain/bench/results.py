"""The rows of a benchmark, and the files that hold them: `results.json` with all, `results.csv` with the rows."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from qlatrain.bench.floors import Ceilings
from qlatrain.bench.shapes import Shape
from qlatrain.files import write_aside, write_json

KIND, FORMAT = "qlatrain bench_kernels", 1
SHORT_DIRECTIONS = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}


@dataclass
class Row:
    """A backend at a shape in a direction. Figures are None where nothing was measured.

    status: ok; wrong (its results miss the bars, so it has no speed); refused (the backend says why); failed.
    fraction_of_floor: the least time by formula over the time measured, 0..1.
    ratio_to_baseline: the baseline's time over this one's: above 1 is faster.
    best: the fastest of the right ones at this shape in this direction.
    """

    operator: str
    operator_short: str
    shape: str
    slug: str
    direction: str
    backend: str
    batch: int
    tokens: int
    documents: int | None
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    cuda_graph: bool
    status: str = "ok"
    reason: str = ""
    note: str = ""
    milliseconds: float | None = None
    milliseconds_lower: float | None = None  # quartiles
    milliseconds_upper: float | None = None
    host_milliseconds: float | None = None  # to issue a call
    repeats: int | None = None
    tokens_per_second: float | None = None
    tflops_per_second: float | None = None  # of the FLOPs by formula
    gbytes_per_second: float | None = None  # of the bytes by formula
    floor_milliseconds: float | None = None
    floor_bound: str = ""  # compute or memory
    flops_per_byte: float | None = None  # by formula
    fraction_of_floor: float | None = None
    ratio_to_baseline: float | None = None
    best: bool = False
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    kept_bytes_per_token_and_value_head: float | None = None
    first_call_seconds: float | None = None  # in this process, with whatever the caches hold
    reference: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, operator: str, short: str, shape: Shape, direction: str, backend: str, **rest) -> "Row":
        return cls(operator, short, str(shape), shape.slug, direction, backend, **asdict(shape), **rest)

    @property
    def key(self) -> str:
        """`gdn/fwd+bwd/8x4096_16-32/tilelang`: the same in every run of the same thing."""
        return f"{self.operator_short}/{SHORT_DIRECTIONS[self.direction]}/{self.slug}/{self.backend}"

    @property
    def worst_error(self) -> tuple[str, float] | None:
        """The tensor that is nearest to its bar, or furthest beyond."""
        if not self.errors:
            return None
        name = max(self.errors, key=lambda n: (self.errors[n] != self.errors[n], self.errors[n] / self.bars[n]))
        return name, self.errors[name]


def rank(rows: list[Row], baseline: str) -> None:
    """Fills in `best` and `ratio_to_baseline` of the rows of one shape and direction."""
    timed = [row for row in rows if row.status == "ok" and row.milliseconds is not None]
    for row in timed:
        row.best = row.milliseconds == min(other.milliseconds for other in timed)
        for other in timed:
            if other.backend == baseline:
                row.ratio_to_baseline = other.milliseconds / row.milliseconds


@dataclass
class Results:
    """All that a run found out."""

    device: str
    rows: list[Row]
    ceilings: Ceilings | None = None
    cold_starts: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """`results.json` and `results.csv`. Raises WriteError when the system refuses."""
        write_json(folder / "results.json", {"kind": KIND, "format": FORMAT} | _finite(asdict(self)))
        write_aside(folder / "results.csv", self.csv())

    def csv(self) -> str:
        """The rows; errors in a column each."""
        tensors = sorted({name for row in self.rows for name in row.errors})
        names = [item.name for item in fields(Row) if item.name not in ("errors", "bars")]
        return csv_text(
            [*names, *(f"error_{name}" for name in tensors)],
            ([getattr(row, name) for name in names] + [row.errors.get(name) for name in tensors] for row in self.rows),
        )

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Raises ValueError for what is no results.json of this version."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: give a results.json of bench_kernels") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{path} is not a result file of bench_kernels: give its results.json")
        if content.get("format") != FORMAT:
            raise ValueError(f"{path} has result format {content.get('format')}, this version reads {FORMAT}")
        try:
            rows = [Row(**row | {"errors": _numbers(row["errors"])}) for row in content["rows"]]
            ceilings = Ceilings(**content["ceilings"]) if content["ceilings"] else None
            rest = {item.name: content[item.name] for item in fields(cls) if item.name not in ("rows", "ceilings")}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not whole ({error}): measure it again") from error
        return cls(rows=rows, ceilings=ceilings, **rest)


def csv_text(header: list[str], rows: Iterable[list]) -> str:
    """A table as text; None leaves a field empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def _numbers(errors: dict[str, float | str]) -> dict[str, float]:
    return {name: float(error) for name, error in errors.items()}


def _finite(content):
    """NaN and infinities as text, which JSON has no numbers for."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not abs(content) < float("inf"):
        return str(content)
    return content
