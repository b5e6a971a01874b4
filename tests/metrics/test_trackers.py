import os
import threading

import pytest
from accelerate import Accelerator
from wandb_file import read_wandb_file

from qlatrain.config import TrackConfig
from qlatrain.metrics.trackers import Tracker, has_wandb_key


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    """A machine on which nobody has logged in."""
    import wandb

    wandb.teardown()
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield home
    wandb.teardown()


CONFIG = {"model": {"hidden_size": 64, "layer_pattern": ["gdn", "attn"]}, "seed": 3}
TRACK = TrackConfig(backend="wandb", project="some-project", tags=["small"])


def live(run_dir, saved_id, rows) -> str:
    """One life of a run: starts, logs, ends; gives the id to keep."""
    tracker = Tracker(TRACK, "some run", run_dir, saved_id, CONFIG)
    accelerator = Accelerator(cpu=True, log_with=tracker.log_with)
    tracker.start(accelerator)
    for step, values in rows:
        tracker.log(values, step)
    tracker.finish()
    return tracker.id


def test_offline_run_and_its_resume(tmp_path):
    run_dir = tmp_path / "runs" / "some run"
    first = [(step, {"loss": 10.0 / step, "mfu": None}) for step in range(1, 6)]
    # validation at a step already logged, then steps done again after a kill
    second = [(step, {"loss": 20.0 / step}) for step in (4, 5)] + [(5, {"validation_loss": 1.5})]
    second += [(4, {"loss": -1.0}), (6, {"loss": -2.0})]
    identity = live(run_dir, None, first)
    assert live(run_dir, identity, second) == identity

    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    for file, rows in zip(files, (first, second), strict=True):
        run_id, config, history = read_wandb_file(file)
        assert run_id == identity
        assert {key: config[key] for key in CONFIG} == CONFIG
        written = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
        expected = [{k: v for k, v in values.items() if v is not None} | {"step": step} for step, values in rows]
        assert written == expected
        wandb_steps = [row["_step"] for row in history]
        assert wandb_steps == sorted(set(wandb_steps))
        assert wandb_steps[0] == rows[0][0]


def test_wandb_itself_drops_a_smaller_step(tmp_path):
    """Why `Tracker.log` does not hand our step on as it is. If this fails, wandb has learnt it: simplify."""
    import wandb

    run = wandb.init(project="p", mode="offline", dir=str(tmp_path))
    for step in (1, 2, 3, 2):
        run.log({"loss": float(step)}, step=step, commit=True)
    run.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [row["loss"] for row in read_wandb_file(file)[2]] == [1, 2, 3]


def test_arguments(tmp_path):
    new = Tracker(TrackConfig(backend="wandb", entity="us", tags=["a"]), "run", tmp_path)
    kwargs = new.init_kwargs["wandb"]
    assert kwargs == {
        "id": new.id,
        "resume": "allow",
        "name": "run",
        "dir": str(tmp_path),
        "entity": "us",
        "tags": ["a"],
        "mode": "offline",
    }
    assert "offline" in new.note and "no API key" in new.note and new.id in new.note
    again = Tracker(TrackConfig(backend="wandb"), "run", tmp_path, saved_id=new.id)
    assert again.init_kwargs["wandb"]["id"] == again.id == new.id
    assert "going on" in again.note
    assert Tracker(TrackConfig(backend="wandb"), "run", tmp_path).id != new.id


def test_with_a_key_wandb_decides_the_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    tracker = Tracker(TRACK, "run", tmp_path)
    assert "mode" not in tracker.init_kwargs["wandb"]
    assert "offline" not in tracker.note


def test_key_in_netrc(no_key):
    assert not has_wandb_key()
    (no_key / ".netrc").write_text("machine example.com login user password y\n")
    (no_key / ".netrc").chmod(0o600)
    assert not has_wandb_key()
    (no_key / ".netrc").write_text("machine api.wandb.ai login user password " + "x" * 40 + "\n")
    assert has_wandb_key()


def test_disabled_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(TRACK, "run", tmp_path)
    assert "mode" not in tracker.init_kwargs["wandb"] and "disabled" in tracker.note


def test_no_backend(tmp_path):
    tracker = Tracker(TrackConfig(), "run", tmp_path)
    assert tracker.log_with is None and tracker.id is None and tracker.note is None
    threads = threading.active_count()
    accelerator = Accelerator(cpu=True, log_with=tracker.log_with)
    tracker.start(accelerator)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert threading.active_count() == threads
    assert list(tmp_path.glob("wandb")) == []


@pytest.mark.parametrize(("name", "said"), [("wandbb", "did you mean 'wandb'"), ("zzz", "choose from")])
def test_unknown_backend(tmp_path, name, said):
    with pytest.raises(ValueError, match=said):
        Tracker(TrackConfig(backend=name), "run", tmp_path)


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Tracker(TRACK, "run", tmp_path)
