"""A benchmark in wandb: the rows as a table, bar charts, the pictures, and a summary key for each row."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qlatrain.bench.results import SHORT_DIRECTIONS, Results, Row
from qlatrain.bench.step_results import StepResults, StepRow
from qlatrain.config import TrackConfig
from qlatrain.metrics.trackers import Tracker

SUMMARISED = {
    "ms": "milliseconds",
    "tokens_per_second": "tokens_per_second",
    "fraction_of_floor": "fraction_of_floor",
    "ratio_to_baseline": "ratio_to_baseline",
    "kept_bytes": "kept_bytes",
    "peak_bytes": "peak_bytes",
}
COLUMNS = [item.name for item in fields(Row) if item.name not in ("errors", "bars", "operator_short")]
STEP_SUMMARISED = {
    "ms": "milliseconds",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
    "ours_is": "ours_is",
    "peak_bytes": "peak_bytes",
    "first_step_s": "first_step_seconds",
    "fifth_step_s": "fifth_step_seconds",
}
STEP_COLUMNS = [item.name for item in fields(StepRow) if item.name not in ("families", "step_milliseconds")]


@dataclass(frozen=True)
class Tracked:
    """What is sent of a benchmark. facts: added to the config; charts: title → (unit, [[bar, height], ...])."""

    device: str
    facts: dict
    columns: list[str]
    rows: list[list]
    charts: dict[str, tuple[str, list[list]]]
    summary: dict[str, float]

    @classmethod
    def kernels(cls, results: Results) -> "Tracked":
        """Of `bench_kernels`: a chart for each direction, milliseconds of its right rows."""
        charts = {}
        for direction in dict.fromkeys(row.direction for row in results.rows):
            timed = [row for row in results.rows if row.direction == direction and row.milliseconds is not None]
            bars = [[f"{row.shape} {row.backend}", row.milliseconds] for row in timed]
            charts[SHORT_DIRECTIONS[direction]] = ("ms", bars)
        facts = {"environment": results.environment, "ceilings": asdict(results.ceilings)}
        rows = [[getattr(row, name) for name in COLUMNS] for row in results.rows]
        return cls(results.device, facts, COLUMNS, rows, charts, summary_of(results))

    @classmethod
    def step(cls, results: StepResults) -> "Tracked":
        """Of `bench_step`."""
        bars = [[row.model, row.tokens_per_second] for row in results.rows if row.tokens_per_second is not None]
        facts = {"environment": results.environment, "peak_flops": results.peak_flops, "peak_how": results.peak_how}
        rows = [[getattr(row, name) for name in STEP_COLUMNS] for row in results.rows]
        charts = {"tokens_per_second": ("tokens/s", bars)}
        return cls(results.device, facts, STEP_COLUMNS, rows, charts, summary_of_steps(results))


def summary_of_steps(results: StepResults) -> dict[str, float]:
    """`step/hybrid_1b6/2x4096/qlatrain/tokens_per_second` and the like, and `.../kernel_times/gdn_ms`."""
    summary = {}
    for row in results.rows:
        for name, attribute in STEP_SUMMARISED.items():
            if (value := getattr(row, attribute)) is not None:
                summary[f"{row.key}/{name}"] = value
        summary |= {f"{row.key}/kernel_times/{family}_ms": ms for family, ms in row.families.items()}
    return summary


def summary_of(results: Results) -> dict[str, float]:
    """`gdn/fwd+bwd/8x4096_16-32/tilelang/ms` and the like, one set for each row that has a speed."""
    summary = {}
    for row in results.rows:
        if row.milliseconds is None:
            continue
        for name, attribute in SUMMARISED.items():
            if (value := getattr(row, attribute)) is not None:
                summary[f"{row.key}/{name}"] = value
    for start in results.cold_starts:
        for cache in ("empty", "full"):
            if (seconds := start.get(f"{cache}_cache_seconds")) is not None:
                summary[f"cold_start/{start['slug']}/{start['backend']}/{cache}_cache_s"] = seconds
    return summary


class BenchTracker:
    """Sends the results of a run to the backend of a `TrackConfig`, or to nobody; `note` is a line for the log.

    The run is grouped by the name of the device, so that machines can be told apart at a glance.

    Raises:
        ValueError: the backend is unknown or not installed.
    """

    def __init__(self, track: TrackConfig, run_name: str, run_dir: Path, config: dict):
        self._project, self._config, self._run_dir = track.project, config, run_dir
        tracker = Tracker(track, run_name, run_dir)
        self._arguments, self.note = tracker.init_kwargs.get("wandb"), tracker.note

    def send(self, tracked: Tracked, pictures: dict[str, Path]) -> None:
        """One run with everything, started and finished here: what was measured before is not disturbed by it."""
        if self._arguments is None:
            return
        import wandb

        config = self._config | tracked.facts
        run = wandb.init(project=self._project, group=tracked.device, config=config, **self._arguments)
        values = {"rows": wandb.Table(columns=tracked.columns, data=tracked.rows)}
        for title, (unit, bars) in tracked.charts.items():
            table = wandb.Table(columns=["row", unit], data=bars)
            values[f"chart/{title}"] = wandb.plot.bar(table, "row", unit, title=f"{title}, {unit}")
        values |= {name: wandb.Image(str(path)) for name, path in pictures.items()}
        run.log(values)
        run.summary.update(tracked.summary)
        run.finish()
