"""The schema of `bench_kernels`."""

from dataclasses import dataclass, field

from qlatrain.bench.shapes import parse_shape
from qlatrain.checks import check_choice, check_values
from qlatrain.config import CHOICES, RunConfig, TrackConfig

BACKENDS = CHOICES["kernel.gated_delta_rule"][1:]  # without auto
DIRECTIONS = ("forward", "backward", "forward+backward")
DTYPES = ("bfloat16", "float16", "float32")
OPERATORS = ("gated_delta_rule",)


@dataclass
class GridConfig:
    """What is measured: every backend at every shape."""

    shapes: list[str] = field(default_factory=list)  # see bench/shapes.py
    backends: list[str] = field(default_factory=list)
    baseline: str = "torch"  # the backend that ratios are taken to
    dtype: str = "bfloat16"  # of q, k and v; gates are float32


@dataclass
class BenchConfig(GridConfig):
    operators: list[str] = field(default_factory=lambda: list(OPERATORS))
    directions: list[str] = field(default_factory=lambda: list(DIRECTIONS))
    cpu: GridConfig = field(default_factory=GridConfig)  # in place of the above where there is no GPU
    # one shape, that of a model's layer, in place of the list
    from_model: str | None = None  # an option of the model group
    tokens: int = 32768  # of the batch
    batch: int = 1  # rows that the tokens are cut into
    documents: int | None = None  # packed at random into one row
    seed: int = 0
    # timing
    repeats: int = 30  # of a call; 5 at least where they add up to more than a second
    warmup: int = 5
    cuda_graph: bool = False  # replay captured graphs: kernels alone, no time of the host
    cold_start: bool = False  # also the first call of a fresh process, with an empty cache and with a full one
    # checking
    check_key_heads: int = 2  # at sizes above the token-by-token reference, with all their value heads; 0 for all


@dataclass
class BenchKernelsConfig:
    recipe: str = "bench_kernels"
    compare: list[str] = field(default_factory=list)  # two result files: print what changed, and measure nothing
    run: RunConfig = field(default_factory=RunConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)

    def validate(self) -> None:
        """Raises ValueError, one sentence naming the key, for values and combinations that cannot run."""
        check_values(self, BENCH_CHOICES, BENCH_AT_LEAST)
        bench = self.bench
        if len(self.compare) not in (0, 2):
            raise ValueError(f"compare holds {len(self.compare)} files: give two, compare=[before.json,after.json]")
        _validate_list("bench.operators", bench.operators, OPERATORS)
        _validate_list("bench.directions", bench.directions, DIRECTIONS)
        _validate_grid("bench", bench)
        _validate_grid("bench.cpu", bench.cpu)
        if bench.tokens % bench.batch:
            raise ValueError(f"bench.tokens={bench.tokens} is not a multiple of bench.batch={bench.batch}")
        if bench.documents is not None and bench.batch > 1:
            raise ValueError(f"bench.documents={bench.documents} packs one row: leave bench.batch={bench.batch} at 1")
        if bench.documents is not None and bench.documents > bench.tokens:
            raise ValueError(f"bench.documents={bench.documents} is more than bench.tokens={bench.tokens}")


BENCH_CHOICES = {
    "track.backend": CHOICES["track.backend"],
    "bench.dtype": DTYPES,
    "bench.cpu.dtype": DTYPES,
}
BENCH_AT_LEAST = {
    "bench.tokens": 1,
    "bench.batch": 1,
    "bench.documents": 1,
    "bench.repeats": 1,
    "bench.warmup": 0,
    "bench.check_key_heads": 0,
}


def _validate_grid(key: str, grid: GridConfig) -> None:
    _validate_list(f"{key}.backends", grid.backends, BACKENDS)
    if grid.baseline not in grid.backends:
        raise ValueError(f"{key}.baseline={grid.baseline} is not among {key}.backends=[{', '.join(grid.backends)}]")
    shapes = [parse_shape(text, f"{key}.shapes") for text in grid.shapes]
    if not shapes:
        raise ValueError(f"{key}.shapes is empty: give a list such as [8x4096 16/32]")
    if len(set(shapes)) < len(shapes):
        raise ValueError(f"{key}.shapes holds a shape twice: leave one out")


def _validate_list(key: str, values: list[str], options: tuple[str, ...]) -> None:
    if not values:
        raise ValueError(f"{key} is empty: give a list of {', '.join(options)}")
    for value in values:
        check_choice(key, value, options)
    if len(set(values)) < len(values):
        raise ValueError(f"{key}=[{', '.join(values)}] holds one twice: leave it out")
