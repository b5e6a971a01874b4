"""The rows of `bench_step`, and the files that hold them: `results.json` with all, `results.csv` with the rows."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from qlatrain.bench.results import csv_text
from qlatrain.bench.step_job import OURS, StepJob
from qlatrain.files import write_aside, write_json
from qlatrain.metrics.kernel_times import FAMILIES

KIND, FORMAT = "qlatrain bench_step", 1


class NotMeasured(RuntimeError):
    """Our own model could not be measured; the message says why."""


@dataclass
class StepRow:
    """A model at a batch. Figures are None where nothing was measured.

    status: ok; missing (not installed); refused (the peer cannot run this); failed.
    tokens_per_second and mfu: of the median step, over all tokens of the batch and the FLOPs counted for the model.
    families: milliseconds of the profiled steps, the mean of each family; they sum to profiled_milliseconds.
    ours_is: our tokens a second over this row's.
    """

    model: str  # whose
    sizes: str  # name of the model config
    shape: str
    batch: int
    tokens: int
    documents: int | None
    mixed_precision: str
    compiled: bool
    activation_checkpointing: bool
    recompute_mlp: bool
    recompute_convolution: bool
    gradient_dtype: str  # of the blocks' matrices, as the optimizer gets them
    optimizer: str
    status: str = "ok"
    reason: str = ""
    note: str = ""
    backends: str = ""  # which implementation each of our operators ran, and why
    parameters: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    ours_is: float | None = None
    milliseconds: float | None = None  # of a step: the median
    milliseconds_lower: float | None = None  # quartiles
    milliseconds_upper: float | None = None
    wall_seconds: float | None = None  # of all timed steps, by the clock of the host
    steps: int | None = None  # timed
    flops: float | None = None  # of a step
    peak_bytes: int | None = None
    reserved_bytes: int | None = None  # by the allocator of the GPU
    import_seconds: float | None = None  # before anything else, and in none of the times below
    build_seconds: float | None = None
    first_step_seconds: float | None = None  # from the start of building the model to the end of the step
    fifth_step_seconds: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    profiled_milliseconds: float | None = None
    families: dict[str, float] = field(default_factory=dict)
    step_milliseconds: list[float] = field(default_factory=list)  # each timed step

    @classmethod
    def of(cls, job: StepJob, **rest) -> "StepRow":
        shape, train = job.batch_shape, job.train
        return cls(
            job.name,
            job.model.name,
            str(shape),
            shape.batch,
            shape.tokens,
            shape.documents,
            train.mixed_precision,
            train.compile and job.name == OURS,
            train.activation_checkpointing,
            train.recompute_mlp and job.name == OURS,
            train.recompute_convolution and job.name == OURS,
            train.gradient_dtype if job.name == OURS else "float32",
            job.optim.name,
            **rest,
        )

    def fill(self, figures: dict, peak: float) -> None:
        """figures: as `step_process` tells them; peak: FLOP/s of the device."""
        for name, value in figures.items():
            setattr(self, name, value)
        self.steps = len(self.step_milliseconds)
        self.tokens_per_second = 1e3 * self.batch * self.tokens / self.milliseconds
        self.mfu = 1e3 * self.flops / self.milliseconds / peak
        if self.families:
            self.profiled_milliseconds = sum(self.families.values())

    @property
    def key(self) -> str:
        """`step/hybrid_1b6/2x4096/qlatrain`: the same in every run of the same thing."""
        return f"step/{self.sizes}/{self.shape.replace(' ', '_')}/{self.model}"


def compare(rows: list[StepRow]) -> None:
    """Fills in `ours_is`."""
    ours = next((row.tokens_per_second for row in rows if row.model == OURS), None)
    for row in rows:
        if ours and row.tokens_per_second:
            row.ours_is = ours / row.tokens_per_second


@dataclass
class StepResults:
    """All that a run found out. peak_flops: FLOP/s that MFU is taken of, and where they are from."""

    device: str
    rows: list[StepRow]
    peak_flops: float
    peak_how: str
    environment: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """`results.json` and `results.csv`. Raises WriteError when the system refuses."""
        write_json(folder / "results.json", {"kind": KIND, "format": FORMAT} | asdict(self))
        write_aside(folder / "results.csv", self.csv())

    def csv(self) -> str:
        """The rows; families in a column each."""
        names = [item.name for item in fields(StepRow) if item.name not in ("families", "step_milliseconds")]
        return csv_text(
            [*names, *(f"{family}_milliseconds" for family in FAMILIES)],
            ([getattr(row, name) for name in names] + [row.families.get(x) for x in FAMILIES] for row in self.rows),
        )
