from qlatrain.bench.cold_start import cold_start
from qlatrain.bench.shapes import parse_shape

SHAPE = parse_shape("16 packed2 1/2 8/8")


def test_seconds_with_an_empty_and_a_full_cache(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = cold_start("gated_delta_rule", SHAPE, "torch", "float32", seed=0)
    assert found.keys() == {"operator", "shape", "slug", "backend", "empty_cache_seconds", "full_cache_seconds"}
    assert found["shape"] == "16 packed2 1/2 8/8" and found["slug"] == "16_packed2_1-2_8-8"
    assert 0 < found["empty_cache_seconds"] < 60 and 0 < found["full_cache_seconds"] < 60


def test_a_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = cold_start("gated_delta_rule", SHAPE, "tilelang", "float32", seed=0)
    assert "needs a Hopper GPU" in found["reason"] and "empty_cache_seconds" not in found
