import io

from bench_helpers import CEILINGS, made_up_results
from rich.console import Console

from qlatrain.bench.report import BenchReport
from qlatrain.metrics.console import RunConsole


def printed(width: int = 130) -> tuple[BenchReport, io.StringIO]:
    text = io.StringIO()
    return BenchReport(RunConsole(console=Console(file=text, width=width, highlight=False)), 3, 3), text


def rows_of(backend: str, shape: str):
    return [row for row in made_up_results().rows if row.backend == backend and row.shape == shape]


def test_lines_while_it_runs(tmp_path):
    report, text = printed()
    report.banner("some-run", tmp_path, "Some GPU", CEILINGS)
    assert "798 TFLOP/s, a product" in text.getvalue() and "3,000 GB/s, a copy" in text.getvalue()
    report.checked(rows_of("fla", "8x4096 16/32"))
    report.checked(rows_of("flash_qla", "8x4096 16/16 96/192"))
    report.checked(rows_of("tilelang", "32768 packed16 16/32"))
    report.timed([row for row in made_up_results().rows if row.shape == "8x4096 16/32"])
    right, refused, wrong, timed = text.getvalue().splitlines()[-4:]
    assert (
        right.startswith(" 1/12  8x4096 16/32") and "fla       right, o off by 2.0e-03 (bar 4.0e-03)  left 0:" in right
    )
    assert "flash_qla refused: takes K = V = 128, not K=96, V=192" in refused
    assert "tilelang  fwd right; bwd wrong: dg is off by 2.3e-02, bar 8.0e-03; fwd+bwd wrong" in wrong
    assert "fastest: fwd tilelang 0.7 ms, bwd tilelang 0.7 ms, fwd+bwd tilelang 0.7 ms" in timed


def test_tables():
    report, text = printed(160)
    results = made_up_results()
    results.rows[0].note = "a note"
    cold = [{"shape": "8x4096 16/32", "backend": "fla", "empty_cache_seconds": 101.2, "reason": "no second"}]
    report.tables(results.rows, "fla", cold)
    lines = text.getvalue().splitlines()
    (first,) = [line for line in lines if "8x4096 16/32" in line and "tilelang *" in line]
    assert first.split()[:5] == ["8x4096", "16/32", "fwd", "tilelang", "*"] and first.rstrip().endswith("4.29")
    assert sum(" * " in line for line in lines[1:]) == 9
    assert any("flash_qla" in line and "refused" in line for line in lines)
    assert any("tilelang" in line and line.rstrip().endswith("wrong") for line in lines)
    assert any("101.20" in line and "no second" in line for line in lines)
    assert "tilelang bwd, fwd+bwd wrong: dg is off by 2.3e-02, bar 8.0e-03  (32768 packed16 16/32)" in lines
    assert "flash_qla refused: takes K = V = 128, not K=96, V=192  (8x4096 16/16 96/192)" in lines
    assert lines[-1] == "tilelang: a note"
