"""Two result files side by side: what changed, and whether it is more than the noise."""

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlatrain.bench.results import SHORT_DIRECTIONS, Results, Row


@dataclass(frozen=True)
class Change:
    """A row in both files.

    change: of the median time, after over before, less 1; negative is faster. noise: the distance between the
    quartiles of both, root of the sum of squares, over the median before. None where one of them has no speed.
    """

    before: Row | None
    after: Row | None

    @property
    def row(self) -> Row:
        return self.after or self.before

    @property
    def change(self) -> float | None:
        if not self._both_timed:
            return None
        return self.after.milliseconds / self.before.milliseconds - 1

    @property
    def noise(self) -> float | None:
        if not self._both_timed:
            return None
        spreads = [row.milliseconds_upper - row.milliseconds_lower for row in (self.before, self.after)]
        return (spreads[0] ** 2 + spreads[1] ** 2) ** 0.5 / self.before.milliseconds

    @property
    def verdict(self) -> str:
        if self.before is None or self.after is None:
            return "only after" if self.before is None else "only before"
        if not self._both_timed:
            before, after = self.before.status, self.after.status
            return f"{before}, then {after}" if before != after else after
        if abs(self.change) <= self.noise:
            return "within noise"
        return "faster" if self.change < 0 else "slower"

    @property
    def _both_timed(self) -> bool:
        return all(row is not None and row.milliseconds is not None for row in (self.before, self.after))


def changes(before: Results, after: Results) -> list[Change]:
    """Every row of either file, in the order of the second."""
    old, new = ({row.key: row for row in results.rows} for results in (before, after))
    return [Change(old.get(key), new.get(key)) for key in dict.fromkeys([*new, *old])]


def print_comparison(paths: list[str], console: Console) -> None:
    """Raises ValueError when a file is no result file."""
    before, after = (Results.read(Path(path)) for path in paths)
    console.print(f"before  {_origin(before, paths[0])}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"after   {_origin(after, paths[1])}", soft_wrap=True, highlight=False, markup=False)
    for line in differences(before, after):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    found = changes(before, after)
    console.print(_table(found))
    counts = dict.fromkeys(("faster", "slower", "within noise"), 0)
    for change in found:
        counts[change.verdict] = counts.get(change.verdict, 0) + 1
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)


def differences(before: Results, after: Results) -> list[str]:
    """What else is not the same, and may be the reason: device, versions, how calls were timed."""
    pairs = [("device", before.device, after.device)]
    versions = [results.environment.get("versions", {}) for results in (before, after)]
    pairs += [
        (name, versions[0].get(name), versions[1].get(name)) for name in dict.fromkeys([*versions[0], *versions[1]])
    ]
    for name in ("dtype", "cuda_graph"):
        values = [sorted({str(getattr(row, name)) for row in results.rows}) for results in (before, after)]
        pairs.append((name, ", ".join(values[0]), ", ".join(values[1])))
    return [f"{name}: {old} before, {new} after" for name, old, new in pairs if old != new]


def _origin(results: Results, path: str) -> str:
    environment = results.environment
    commit = (environment.get("git_commit") or "no commit")[:10]
    changed = " with changes" if environment.get("git_dirty") else ""
    return f"{path}: {results.device}, commit {commit}{changed}, {environment.get('time')}"


def _table(found: list[Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("shape", "", "backend"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms before", "ms after", "change", "noise"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    styles = {"faster": "bold green", "slower": "bold red", "within noise": "dim"}
    for change in found:
        row = change.row
        table.add_row(
            escape(row.shape),
            SHORT_DIRECTIONS[row.direction],
            row.backend,
            _milliseconds(change.before),
            _milliseconds(change.after),
            "" if change.change is None else f"{100 * change.change:+.1f} %",
            "" if change.noise is None else f"± {100 * change.noise:.1f} %",
            Text(change.verdict, style=styles.get(change.verdict, "yellow")),
        )
    return table


def _milliseconds(row: Row | None) -> str:
    if row is None or row.milliseconds is None:
        return ""
    return f"{row.milliseconds:.4g}"
