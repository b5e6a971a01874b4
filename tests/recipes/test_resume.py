"""A run that was stopped, in whatever way, goes on as if it had not been."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from training_runs import checkpoint_names, file_bytes, losses, repeatable

WEIGHTS = "model/model.safetensors"


@pytest.mark.parametrize(("seed", "workers"), [(1, (0,)), (2, (2, 0))])
def test_killed_at_random_and_resumed_is_bit_identical(trainer, finished_run, tmp_path, seed, workers):
    run_dir, chance = tmp_path / "run", random.Random(seed)
    lives, kills = 0, 0
    while True:
        arguments = ("checkpoint.every=2", f"data.workers={workers[lives % len(workers)]}")
        running = trainer.start(run_dir, *arguments)
        lives += 1
        done = max(losses(run_dir), default=0)
        if kills < 3 and running.wait_for_step(run_dir, min(done + chance.randint(1, 4), 11)):
            time.sleep(chance.random() * 0.05)
            running.send(signal.SIGKILL)
        finished = running.wait()
        if finished.code == 0:
            break
        assert finished.code == -signal.SIGKILL, finished.err
        kills += 1
        assert kills <= 3
    assert kills >= 2, "the run was never killed: the test says nothing"
    assert "going on from" in finished.out
    assert repeatable(run_dir) == repeatable(finished_run)
    assert (run_dir / WEIGHTS).read_bytes() == (finished_run / WEIGHTS).read_bytes()
    assert checkpoint_names(run_dir) == ["step-00000010", "step-00000012"]  # nothing half written stays


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(trainer, finished_run, tmp_path, number):
    run_dir = tmp_path / "run"
    running = trainer.start(run_dir, "data.workers=2")
    assert running.wait_for_step(run_dir, 5)
    running.send(number)
    stopped = running.wait()
    assert stopped.code == 0 and stopped.err == ""
    (last,) = checkpoint_names(run_dir)[-1:]
    step = int(last.removeprefix("step-"))
    assert 5 <= step < 12 and max(losses(run_dir)) == step
    assert f"step {step} of 12; the same command goes on" in stopped.out
    assert not (run_dir / "model").exists()
    assert trainer.run(run_dir, "data.workers=2").code == 0
    assert repeatable(run_dir) == repeatable(finished_run)
    assert (run_dir / WEIGHTS).read_bytes() == (finished_run / WEIGHTS).read_bytes()


def test_never_refuses_a_run_that_is_there(trainer, finished_run):
    before = file_bytes(finished_run)
    done = trainer.run(finished_run, "resume=never")
    assert done.code == 1 and done.err.startswith(f"error: resume=never, but {finished_run} already holds a run")
    assert file_bytes(finished_run) == before


def test_from_a_path(trainer, finished_run, tmp_path):
    done = trainer.run(tmp_path / "run", f"resume={finished_run}/checkpoints/step-00000008")
    assert done.code == 0
    # the console wraps no line, so the path stands there whole
    assert f"going on from {finished_run}/checkpoints/step-00000008, step 8" in done.out
    assert repeatable(tmp_path / "run") == [row for row in repeatable(finished_run) if int(row["step"]) > 8]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (finished_run / WEIGHTS).read_bytes()


def test_a_finished_run_is_left_as_it_is(trainer, finished_run, tmp_path):
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    done = trainer.run(run_dir)
    assert done.code == 0 and "\nstep " not in done.out
    assert losses(run_dir) == losses(finished_run)
    assert file_bytes(run_dir / "model") == file_bytes(finished_run / "model")


def test_a_finished_run_with_more_steps_goes_on_from_its_end(trainer, finished_run, tmp_path):
    """The schedule is a function of (step, steps): the steps that are added follow the longer one, at its rates."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    assert trainer.run(run_dir, "train.steps=16").code == 0
    assert list(losses(run_dir)) == list(range(1, 17))
    assert [row for row in repeatable(run_dir) if int(row["step"]) <= 12] == repeatable(finished_run)
    rates = {int(row["step"]): float(row["lr"]) for row in repeatable(run_dir) if "lr" in row}
    assert rates[13] > rates[12]
    assert rates[16] == pytest.approx(0.1 * rates[2])


def test_wsd_is_prolonged_from_a_checkpoint_of_its_stay(trainer, tmp_path):
    """The rate is the same in the stay of both, so the long run is what it would have been from the start."""
    wsd = ("schedule=wsd", "schedule.warmup_steps=2", "checkpoint.keep=3")
    assert trainer.run(tmp_path / "short", "train.steps=6", "checkpoint.every=4", *wsd).code == 0
    assert trainer.run(tmp_path / "long", "train.steps=10", *wsd).code == 0
    stay = tmp_path / "short/checkpoints/step-00000004"
    assert trainer.run(tmp_path / "prolonged", "train.steps=10", f"resume={stay}", *wsd).code == 0
    later = [row for row in repeatable(tmp_path / "long") if int(row["step"]) > 4]
    assert repeatable(tmp_path / "prolonged") == later
    assert (tmp_path / "prolonged" / WEIGHTS).read_bytes() == (tmp_path / "long" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"])
def test_truncated_newest_checkpoint(trainer, finished_run, tmp_path, name):
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    newest = run_dir / "checkpoints/step-00000012"
    truncate(newest / name)
    given = trainer.run(tmp_path / "other", f"resume={newest}")
    assert given.code == 1 and given.err.startswith(f"error: {newest} is ") and given.err.count("\n") == 1
    assert not (tmp_path / "other").exists()
    if name == "model.safetensors":  # the others take the same way
        passed = trainer.run(run_dir)
        assert passed.code == 0
        assert "passed over: " in passed.err and f"{newest} is truncated: {name} has" in passed.err
        assert "going on from" in passed.out and "step-00000008, step 8" in passed.out
        assert repeatable(run_dir) == repeatable(finished_run)
        assert (run_dir / WEIGHTS).read_bytes() == (finished_run / WEIGHTS).read_bytes()


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_gradient_accumulation_is_the_same_training(trainer, finished_run, tmp_path):
    assert trainer.run(tmp_path / "run", "train.micro_batch_size=4").code == 0
    assert_close(losses(tmp_path / "run"), losses(finished_run))


def assert_close(got: dict[int, str], expected: dict[int, str], tolerance: float = 1e-5) -> None:
    """And not by never having moved."""
    assert got.keys() == expected.keys() and len(got) > 2
    apart = max(abs(float(got[step]) - float(expected[step])) for step in expected)
    assert apart < tolerance, f"losses differ by {apart}"
    values = [float(loss) for loss in expected.values()]
    assert max(values) - min(values) > 0.1


def test_two_processes_as_a_launcher_starts_them(trainer, finished_run, tmp_path):
    """torchrun, which `accelerate launch` uses itself; with --cpu that command starts one process only."""
    before = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = trainer.subprocess(*trainer.arguments(tmp_path / "run"), before=before)
    assert done.code == 0, done.err
    assert "2 replicas on cpu" in done.out and done.out.count("run complete") == 1
    assert_close(losses(tmp_path / "run"), losses(finished_run))
    assert len(losses(tmp_path / "run")) == 12


def test_two_processes_go_on_from_one_and_one_from_two(trainer, finished_run, tmp_path):
    run_dir = tmp_path / "run"
    pair = trainer.start_pair(run_dir, f"resume={finished_run}/checkpoints/step-00000004")
    assert pair[0].wait_for_step(run_dir, 6)
    pair[1].send(signal.SIGTERM)  # one is asked, both end at the same step
    assert [process.wait().code for process in pair] == [0, 0]
    (last,) = checkpoint_names(run_dir)[-1:]
    assert {"random-0.safetensors", "random-1.safetensors"} <= file_bytes(run_dir / "checkpoints" / last).keys()
    assert trainer.run(run_dir).code == 0
    expected = {step: loss for step, loss in losses(finished_run).items() if step > 4}
    assert_close(losses(run_dir), expected)


def test_one_layout_refuses_several_processes(trainer, tmp_path):
    for process in trainer.start_pair(tmp_path / "run", "parallel=single"):
        done = process.wait()
        assert done.code == 1
        assert done.err == "error: parallel.layout=single was launched with 2 processes: use parallel=data\n"
