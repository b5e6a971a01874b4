import io

import pytest
from bench_helpers import made_up_results, made_up_row
from rich.console import Console

from qlatrain.bench.compare import Change, changes, differences, print_comparison


def test_a_change_and_its_noise():
    change = Change(made_up_row(ms=2.0), made_up_row(ms=1.0))
    assert change.change == -0.5
    assert change.noise == pytest.approx((0.04**2 + 0.02**2) ** 0.5 / 2)
    assert change.verdict == "faster"
    assert Change(made_up_row(ms=1.0), made_up_row(ms=2.0)).verdict == "slower"
    assert Change(made_up_row(ms=1.0), made_up_row(ms=1.01)).verdict == "within noise"


def test_rows_without_a_speed():
    wrong = made_up_row(ms=None, status="wrong")
    assert Change(made_up_row(), wrong).verdict == "ok, then wrong"
    assert Change(wrong, wrong).verdict == "wrong"
    assert Change(None, made_up_row()).verdict == "only after"
    assert Change(made_up_row(), None).verdict == "only before"
    assert Change(made_up_row(), wrong).change is None


def test_every_row_of_both_files():
    before, after = made_up_results(), made_up_results()
    before.rows, after.rows = before.rows[:20], after.rows[5:]
    found = changes(before, after)
    assert len(found) == 27
    assert sum(change.before is None for change in found) == 7 and sum(change.after is None for change in found) == 5


def test_what_else_differs():
    before, after = made_up_results(), made_up_results()
    assert differences(before, after) == []
    after.device, after.environment = "Other GPU", {"versions": {"torch": "2.13"}}
    for row in after.rows:
        row.cuda_graph = True
    assert differences(before, after) == [
        "device: Some GPU before, Other GPU after",
        "torch: 2.11 before, 2.13 after",
        "cuda_graph: False before, True after",
    ]


def test_printed(tmp_path):
    for name, results in (("before", made_up_results()), ("after", made_up_results(0.8))):
        (tmp_path / name).mkdir()
        results.write(tmp_path / name)
    text = io.StringIO()
    paths = [str(tmp_path / name / "results.json") for name in ("before", "after")]
    print_comparison(paths, Console(file=text, width=140))
    lines = text.getvalue().splitlines()
    (line,) = [line for line in lines if "8x4096 16/32" in line and "tilelang" in line and " fwd " in line]
    assert "-20.0 %   ± 2.6 %   faster" in line
    assert lines[-1] == "7 faster, 0 slower, 15 within noise, 2 wrong, 3 refused"
