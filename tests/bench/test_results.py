import csv
import json
import math

import pytest
from bench_helpers import made_up_results, made_up_row

from qlatrain.bench.results import Results, rank


def test_keys():
    row = made_up_row("8x4096 16/32", "forward+backward", "tilelang")
    assert row.key == "gdn/fwd+bwd/8x4096_16-32/tilelang"
    keys = [row.key for row in made_up_results().rows]
    assert len(set(keys)) == len(keys) == 27


def test_worst_error():
    assert made_up_row().worst_error == ("o", 2e-3)
    assert made_up_row(errors={"o": 2e-3, "dg": math.nan}).worst_error[0] == "dg"
    assert made_up_row(errors={}).worst_error is None


def test_rank():
    rows = [made_up_row(backend=name, ms=ms) for name, ms in (("a", 4.0), ("b", 1.0), ("c", None))]
    rows[2].status = "wrong"
    rank(rows, "a")
    assert [row.best for row in rows] == [False, True, False]
    assert [row.ratio_to_baseline for row in rows] == [1.0, 4.0, None]
    rank(rows[1:], "nobody")
    assert rows[1].best


def test_written_and_read_back(tmp_path):
    results = made_up_results()
    results.rows[0].errors["dg"] = math.inf
    results.cold_starts = [{"shape": "8x4096 16/32", "backend": "fla", "empty_cache_seconds": 101.0}]
    results.write(tmp_path)
    assert Results.read(tmp_path / "results.json") == results
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 and rows[0]["shape"] == "8x4096 16/32" and rows[0]["backend"] == "tilelang"
    assert float(rows[0]["milliseconds"]) == results.rows[0].milliseconds
    assert float(rows[1]["error_o"]) == 2e-3 and rows[-2]["milliseconds"] == ""


def text_of(change) -> str:
    content = {"kind": "qlatrain bench_kernels", "format": 1, "device": "x", "rows": [], "ceilings": None}
    content |= {"cold_starts": [], "environment": {}, "config": {}}
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "is not JSON"),
        ("[1]", "is not a result file"),
        ('{"loss": 3}', "is not a result file"),
        (text_of(lambda c: c.update(format=2)), "has result format 2, this version reads 1"),
        (text_of(lambda c: c.pop("rows")), "is not whole"),
        (text_of(lambda c: c.update(rows=[{"errors": {}}])), "is not whole"),
        (text_of(lambda c: c.update(rows=[3])), "is not whole"),
    ],
)
def test_files_of_another_kind(tmp_path, text, said):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        Results.read(path)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Results.read(tmp_path / "nothing.json")
