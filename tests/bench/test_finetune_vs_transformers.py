"""The finetuning benchmark, for real on a CPU, and what it does when a side fails."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from qlatrain.bench.finetune_job import write_conversations

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "finetune_vs_transformers.py"
TINY = (
    "--model-config=tiny",
    "--rows-per-step=2",
    "--row-tokens=128",
    "--steps=2",
    "--warmup=1",
    "--no-compile",
    "--load-repeats=1",
)


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Runs the script in this process: what it wrote, and its exit code. Its parts run in processes of their own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("finetune_vs_transformers", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: str) -> tuple[dict, object]:
        out = tmp_path / "results" / "result.json"
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(out), *TINY, *arguments])
        code = 0
        try:
            script.main()
        except SystemExit as ended:
            code = ended.code
        return json.loads(out.read_text()) if out.exists() else {}, code

    run.script = script
    return run


def test_both_sides_on_a_cpu(benchmark, tmp_path, capsys):
    folder = tmp_path / "work"
    result, code = benchmark(f"--folder={folder}", "--peer-micro-rows=1", "--max-shard-bytes=400000")
    assert code == 0
    assert result["kind"] == "qlatrain finetune_vs_transformers" and result["format"] == 1
    assert result["checkpoint"]["shards"] > 1
    assert result["checkpoint"]["largest_shard_bytes"] <= 400_000 + 10_000  # and its header
    assert result["environment"]["versions"]["transformers"]
    for name, micro_rows in (("qlatrain", 2), ("transformers", 1)):
        load, steps = result["sides"][name]["load"], result["sides"][name]["finetune"]
        assert load["status"] == "ok" and load["seconds"] > 0 and load["parameters"] == 900_472
        assert load["host_peak_bytes"] - load["host_before_bytes"] == load["host_growth_bytes"] > 0
        assert steps["status"] == "ok" and steps["micro_rows"] == micro_rows and steps["attempts"] == []
        assert len(steps["step_milliseconds"]) == 2
        lower, upper = sorted(256e3 / x for x in steps["step_milliseconds"])
        assert lower <= steps["tokens_per_second"] <= upper
    ours, theirs = (result["sides"][name]["finetune"] for name in ("qlatrain", "transformers"))
    assert result["ratio"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    # the same weights and rows; without FLA theirs run across the boundaries of conversations
    assert ours["mean_loss"] == pytest.approx(theirs["mean_loss"], rel=0.01)
    assert "across the boundaries" in theirs["note"]
    assert "gated_delta_rule: backend torch" in ours["backends"]
    assert not (folder / "run-qlatrain-2" / "model").exists()
    assert "tokens/s" in capsys.readouterr().out


def answers(benchmark, monkeypatch, reasons: dict) -> list:
    """Puts made-up ends of processes in the place of real ones; the jobs that were asked for. reasons: by side, of what
    takes more than one row."""
    asked, loads = [], []

    def last_event(process, arguments, told, *_):
        job = json.loads(told)
        if arguments == ("checkpoint",):
            Path(job["folder"]).mkdir()
            Path(job["folder"], "model.safetensors").write_bytes(b"1234")
        if arguments != ("finetune",):
            loads.append(job.get("side"))
            return {"event": "measured", "seconds": 9.0 - len(loads), "host_growth_bytes": 10}
        asked.append((job["side"], job["micro_rows"]))
        if job["side"] in reasons and job["micro_rows"] > 1:
            return {"event": "failed", "reason": reasons[job["side"]]}
        figures = {"tokens_per_second": 100.0 * job["micro_rows"], "mean_tokens_per_second": 1.0, "mean_loss": 1.0}
        return {"event": "measured", **figures, "first_step_seconds": 1.0, "peak_bytes": 5}

    monkeypatch.setattr(benchmark.script, "last_event", last_event)
    return asked


def test_out_of_memory_halves_the_rows_at_once(benchmark, monkeypatch):
    asked = answers(benchmark, monkeypatch, {"transformers": "out of memory: tried to allocate 8 GiB"})
    result, code = benchmark("--rows-per-step=6")
    assert code == 0 and result["ratio"] == 6.0
    assert asked == [("qlatrain", 6), ("transformers", 6), ("transformers", 3), ("transformers", 1)]
    assert [x["micro_rows"] for x in result["sides"]["transformers"]["finetune"]["attempts"]] == [6, 3]


def test_a_peer_that_fails_leaves_our_figures(benchmark, monkeypatch, capsys):
    asked = answers(benchmark, monkeypatch, {"transformers": "ValueError: no such thing"})
    result, code = benchmark("--load-repeats=2")
    assert code == 0 and len(asked) == 2 and result["ratio"] is None
    assert result["sides"]["qlatrain"]["load"]["all_seconds"] == [7.0, 5.0]  # in turn; before them the checkpoint
    assert result["sides"]["qlatrain"]["load"]["seconds"] == 5.0
    assert result["sides"]["qlatrain"]["finetune"]["tokens_per_second"] == 200
    assert result["sides"]["transformers"]["finetune"]["status"] == "failed"
    assert "transformers: ValueError: no such thing" in capsys.readouterr().out


def test_our_failure_leaves_the_peers_figures(benchmark, monkeypatch):
    answers(benchmark, monkeypatch, {"qlatrain": "error: no space left"})
    result, code = benchmark()
    assert "no space left" in code
    assert result["sides"]["transformers"]["finetune"]["tokens_per_second"] == 200


def test_no_peers_and_what_is_refused(benchmark, monkeypatch, capsys):
    asked = answers(benchmark, monkeypatch, {})
    result, _ = benchmark("--peers=none")
    assert asked == [("qlatrain", 2)] and result["sides"].keys() == {"qlatrain"} and result["ratio"] is None
    _, code = benchmark("--model-config=tony")
    assert code == 2 and "did you mean tiny" in capsys.readouterr().err
    _, code = benchmark("--micro-rows=3")
    assert code == 2 and "--micro-rows 3 does not divide --rows-per-step 2" in capsys.readouterr().err


def test_conversations(tmp_path):
    counts = [write_conversations(tmp_path / name, 200_000, 4096, seed=3) for name in ("a", "b")]
    text = (tmp_path / "a").read_text()
    assert counts[0] == counts[1] == text.count("\n") and text == (tmp_path / "b").read_text()
    chats = [json.loads(line)["messages"] for line in text.splitlines()]
    lengths = sorted(sum(len(turn["content"]) for turn in chat) for chat in chats)
    assert 800 < lengths[len(lengths) // 2] < 3000 and lengths[0] < 600 and lengths[-1] > 4096
    assert all(turn["content"] for chat in chats for turn in chat)
    assert {turn["role"] for turn in chats[0]} == {"user", "assistant"}
