"""A benchmark in wandb: the rows as a table, bar charts, the pictures, and a summary key for each row."""

from dataclasses import asdict, fields
from pathlib import Path

from qlatrain.bench.results import SHORT_DIRECTIONS, Results, Row
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

    def send(self, results: Results, pictures: dict[str, Path]) -> None:
        """One run with everything, started and finished here: what was measured before is not disturbed by it."""
        if self._arguments is None:
            return
        import wandb

        config = self._config | {"environment": results.environment, "ceilings": asdict(results.ceilings)}
        run = wandb.init(project=self._project, group=results.device, config=config, **self._arguments)
        values = {
            "rows": wandb.Table(columns=COLUMNS, data=[[getattr(row, n) for n in COLUMNS] for row in results.rows])
        }
        for direction in dict.fromkeys(row.direction for row in results.rows):
            values[f"chart/{SHORT_DIRECTIONS[direction]}"] = self._bars(results, direction)
        values |= {name: wandb.Image(str(path)) for name, path in pictures.items()}
        run.log(values)
        run.summary.update(summary_of(results))
        run.finish()

    @staticmethod
    def _bars(results: Results, direction: str):
        """Milliseconds of each right row of a direction."""
        import wandb

        rows = [row for row in results.rows if row.direction == direction and row.milliseconds is not None]
        data = [[f"{row.shape} {row.backend}", row.milliseconds] for row in rows]
        table = wandb.Table(columns=["row", "ms"], data=data)
        return wandb.plot.bar(table, "row", "ms", title=f"{direction}, ms")
