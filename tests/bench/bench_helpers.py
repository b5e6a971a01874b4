"""Rows and result files with made-up figures."""

from qlatrain.bench.floors import Ceilings
from qlatrain.bench.results import Results, Row, rank
from qlatrain.bench.shapes import parse_shape

DIRECTIONS = ("forward", "backward", "forward+backward")
CEILINGS = Ceilings(798e12, "a product", 3.0e12, "a copy")


def made_up_row(
    shape: str = "8x4096 16/32", direction: str = "forward", backend: str = "torch", ms: float | None = 2.0, **changes
) -> Row:
    """A right row of 1 % spread either way; without a speed when `ms` is None."""
    parsed = parse_shape(shape)
    row = Row.of("gated_delta_rule", "gdn", parsed, direction, backend, dtype="bfloat16", cuda_graph=False)
    row.errors, row.bars = {"o": 2e-3, "dg": 3e-3}, {"o": 4e-3, "dg": 8e-3}
    row.floor_milliseconds, row.floor_bound, row.flops_per_byte = 0.3, "memory", 190.0
    if ms is not None:
        row.milliseconds, row.milliseconds_lower, row.milliseconds_upper, row.repeats = ms, 0.99 * ms, 1.01 * ms, 30
        row.tokens_per_second = 1e3 * parsed.all_tokens / ms
        row.tflops_per_second, row.gbytes_per_second, row.fraction_of_floor = 100 / ms, 900 / ms, 0.3 / ms
    for name, value in changes.items():
        setattr(row, name, value)
    return row


def made_up_results(factor: float = 1.0) -> Results:
    """Three shapes, three backends: one refuses a shape, and one is wrong in the backward of another."""
    rows = []
    for shape in ("8x4096 16/32", "32768 packed16 16/32", "8x4096 16/16 96/192"):
        for direction in DIRECTIONS:
            of_direction = []
            for backend, ms in (("tilelang", 0.7 * factor), ("flash_qla", 1.1), ("fla", 3.0)):
                row = made_up_row(shape, direction, backend, ms)
                if backend == "flash_qla" and "96/192" in shape:
                    reason = "takes K = V = 128, not K=96, V=192"
                    row = made_up_row(shape, direction, backend, None, status="refused", reason=reason, errors={})
                if backend == "tilelang" and "packed" in shape and direction != "forward":
                    reason = "wrong: dg is off by 2.3e-02, bar 8.0e-03"
                    row = made_up_row(shape, direction, backend, None, status="wrong", reason=reason)
                of_direction.append(row)
            rank(of_direction, "fla")
            rows += of_direction
    environment = {"versions": {"torch": "2.11"}, "git_commit": "0123456789ab", "git_dirty": False, "time": "some day"}
    return Results("Some GPU", rows, CEILINGS, environment=environment)
