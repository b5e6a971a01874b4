"""What a run prints and leaves behind."""

import json
import re
import signal

import pytest
import torch
import yaml
from training_runs import SECONDS, checkpoint_names, file_bytes, losses, metric_rows, repeatable

from qlatrain.metrics.kernel_times import FAMILIES
from qlatrain.metrics.recorder import read_metrics
from qlatrain.models.huggingface import from_pretrained


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(run directory, what the plain command printed) of twelve steps with two validations."""
    from training_runs import Trainer

    folder = tmp_path_factory.mktemp("pretrain")
    trainer = Trainer(corpus, folder / "output")
    done = trainer.subprocess(*trainer.arguments(folder / "run", "validation.every=6", "data.workers=2"))
    assert done.code == 0, done.err
    return folder / "run", done


def test_run_directory_holds_all(run):
    run_dir, _ = run
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "loss.png",
        "metrics.jsonl",
        "model",
        "samples.txt",
    }
    assert checkpoint_names(run_dir) == ["step-00000008", "step-00000012"]
    model = {path.name for path in (run_dir / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= model


def test_files_say_what_ran(run):
    run_dir, _ = run
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["train"]["steps"] == 12 and config["model"]["hidden_size"] == 32
    assert config["run"]["dir"] == str(run_dir)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert {"command", "git_commit", "python", "versions", "cpu"} <= environment.keys()
    assert environment["layout"] == "one process on cpu"
    assert environment["settings"] == "mixed precision no, eager"
    assert any(line.startswith("gated_delta_rule: backend torch on cpu") for line in environment["backends"])
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "samples.txt").read_text().startswith("the")


def test_metrics_of_every_step(run):
    run_dir, _ = run
    assert list(losses(run_dir)) == list(range(1, 13))
    rows = metric_rows(run_dir)
    validations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in validations] == ["6", "12"]
    assert all({"validation_bits_per_byte", "bigram_bits_per_byte"} <= row.keys() for row in validations)
    assert int(rows[-2]["tokens"]) > 12 * 4 * 64 * 0.9  # targets: all tokens but a document's last
    assert float(rows[-2]["loss"]) < float(rows[0]["loss"])


def test_printed_output(run):
    run_dir, done = run
    steps = re.findall(r"^step +(\d+)/12  loss +\d\.\d{4}  lr \S+  grad norm +\S+ +\S+ tok/s", done.out, re.MULTILINE)
    assert steps == [str(step) for step in range(1, 13)]
    (backend,) = re.findall(r"^gated_delta_rule: backend .*", done.out, re.MULTILINE)
    assert backend.startswith("gated_delta_rule: backend torch on cpu (not ") and "tilelang: needs" in backend
    (bigram,) = {row["bigram_bits_per_byte"] for row in metric_rows(run_dir) if "bigram_bits_per_byte" in row}
    assert done.out.count(f"byte bigram {float(bigram):.4f}") >= 2
    assert re.search(r"^validation at step 6  loss \S+  \S+ bits per byte", done.out, re.MULTILINE)
    assert "run complete" in done.out and str(run_dir / "model") in done.out
    assert done.err == ""


def test_the_model_opens_in_transformers(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run[0] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "document 3 line 4: the fox"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        ours = from_pretrained(folder)(ids)
    assert theirs.std() > 0.01
    assert (theirs - ours).abs().max() < 1e-4


def test_the_model_is_the_last_checkpoint(run):
    run_dir, _ = run
    name = "model.safetensors"
    assert (run_dir / "model" / name).read_bytes() == (run_dir / "checkpoints/step-00000012" / name).read_bytes()


def test_wandb_goes_on_with_the_same_run(trainer, tmp_path):
    from wandb_file import read_wandb_file

    run_dir = tmp_path / "run"
    home = tmp_path / "home"  # where nobody has logged in
    home.mkdir()
    for checkpoint_of, arguments in ((4, ["train.steps=4"]), (8, ["train.steps=8"])):
        done = trainer.subprocess(*trainer.arguments(run_dir, "track=wandb", *arguments), HOME=str(home))
        assert done.code == 0, done.err
        state = json.loads((run_dir / f"checkpoints/step-{checkpoint_of:08}/state.json").read_text())
        identity = state["tracker_id"]
        assert re.search(rf"^wandb: (new|going on with) run {identity} of project qlatrain, offline", done.out, re.M)
    assert "going on with run" in done.out
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    runs = [read_wandb_file(file) for file in files]
    assert [run_id for run_id, _, _ in runs] == [identity, identity]
    steps = [row["step"] for _, _, history in runs for row in history if "loss" in row]
    assert steps == list(range(1, 9))
    assert runs[0][1]["model"]["hidden_size"] == 32


KERNEL_TIMES = {f"kernel_times/{family}" for family in FAMILIES}
LINE = r"^kernel times at step (\d+)  [\d,.]+ ms  GDN [\d.]+ %  attention .*  optimizer .*  idle [\d.]+ %$"


def test_kernel_times_of_every_fourth_step(trainer, finished_run, tmp_path):
    """In metrics.jsonl, on the console and in wandb, of a run that is otherwise the same."""
    from wandb_file import read_wandb_file

    run_dir, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    arguments = trainer.arguments(run_dir, "track=wandb", "metrics.kernel_times_every=4", "checkpoint.keep=3")
    done = trainer.subprocess(*arguments, HOME=str(home))
    assert (done.code, done.err) == (0, "")
    rows = {row["step"]: row for row in read_metrics(run_dir / "metrics.jsonl") if "kernel_times/gdn" in row}
    assert list(rows) == [4, 8, 12]
    for row in rows.values():
        assert row.keys() == {"step", "kernel_times/step_ms"} | KERNEL_TIMES | {f"{key}_ms" for key in KERNEL_TIMES}
        assert sum(row[key] for key in KERNEL_TIMES) == pytest.approx(1)
        assert sum(row[f"{key}_ms"] for key in KERNEL_TIMES) == pytest.approx(row["kernel_times/step_ms"])
        assert min(row[key] for key in KERNEL_TIMES - {"kernel_times/communication"}) > 0
    assert re.findall(LINE, done.out, re.MULTILINE) == ["4", "8", "12"]
    assert "3 profiled" in done.out
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    tracked = [row for row in read_wandb_file(file)[2] if "kernel_times/gdn" in row]
    assert [{key: row[key] for key in row if key[0] != "_"} for row in tracked] == list(rows.values())
    # the profiled steps have no speed, and everything else is as it was
    speeds = {row["step"]: row["tokens_per_second"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row}
    assert [step for step, speed in speeds.items() if speed is None] == [4, 8, 12]
    assert without_kernel_times(run_dir) == repeatable(finished_run)
    expected = {name: content for name, content in file_bytes(finished_run).items() if name.endswith(".safetensors")}
    assert len(expected) > 3 and {name: (run_dir / name).read_bytes() for name in expected} == expected


def without_kernel_times(run_dir):
    return [row for row in repeatable(run_dir) if "kernel_times/gdn" not in row]


def test_killed_between_profiles_and_resumed(trainer, finished_run, tmp_path):
    run_dir = tmp_path / "run"
    running = trainer.start(run_dir, "metrics.kernel_times_every=3")
    assert running.wait_for_step(run_dir, 6)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert trainer.run(run_dir, "metrics.kernel_times_every=3").code == 0
    assert without_kernel_times(run_dir) == repeatable(finished_run)
    assert [row["step"] for row in metric_rows(run_dir) if "kernel_times/gdn" in row] == ["3", "6", "9", "12"]


def test_kernel_times_of_two_processes(trainer, tmp_path):
    """The main process alone profiles; both end at the same step when one is asked to."""
    arguments = ("metrics.kernel_times_every=1", "train.steps=400", "checkpoint.every=400")
    pair = trainer.start_pair(tmp_path / "run", *arguments)
    assert pair[0].wait_for_step(tmp_path / "run", 3)
    pair[1].send(signal.SIGTERM)
    done = [process.wait() for process in pair]
    assert [process.code for process in done] == [0, 0], done
    steps = [row["step"] for row in metric_rows(tmp_path / "run") if "kernel_times/gdn" in row]
    assert steps == [str(step) for step in losses(tmp_path / "run")]
    assert done[1].out == ""


def test_compiled_blocks_train_alike(trainer, finished_run, tmp_path):
    compiled = tmp_path / "compiled"
    done = trainer.start(compiled, "train.compile=true").wait(2 * SECONDS)  # two blocks to compile, with gcc
    assert done.code == 0, done.err
    assert "settings       mixed precision no, compiled\n" in re.sub(" +\n", "\n", done.out)
    losses_of_both = losses(compiled), losses(finished_run)
    assert losses_of_both[0].keys() == losses_of_both[1].keys()
    for step, loss in losses_of_both[0].items():
        assert float(loss) == pytest.approx(float(losses_of_both[1][step]), rel=1e-4)
    assert from_pretrained(compiled / "model").config.hidden_size == 32  # names without the compiler's prefix
