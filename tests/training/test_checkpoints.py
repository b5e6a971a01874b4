import json
import logging
import resource
from contextlib import contextmanager

import pytest
import torch
from training_helpers import (
    assert_identical,
    fill_gradients,
    one_process,
    optimizers_of,
    snapshot,
    tiny_model,
)

from qlatrain.training import checkpoints as checkpoints_module
from qlatrain.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    TrainState,
    complete_checkpoints,
    find_checkpoint,
    read_state,
)

FILES = {"model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"}


class Run:
    """A model, its optimizers and its checkpoints in `folder`."""

    def __init__(self, folder, keep: int = 2, seed: int = 0, optimizer: str = "muon", **model_changes):
        self.model = tiny_model(seed, **model_changes)
        self.optimizers = optimizers_of(self.model, optimizer)
        self.checkpoints = Checkpoints(folder, keep, one_process())

    def step(self, seed: int = 0) -> None:
        fill_gradients(self.model, seed)
        self.optimizers.step(1.0, torch.tensor(0.0))

    def save(self, step: int) -> None:
        self.checkpoints.save(self.model, self.optimizers, TrainState(step, {"offset": step}, 10 * step, 1, "abc"))

    def load(self, folder) -> TrainState:
        return self.checkpoints.load(folder, self.model, self.optimizers)

    def snapshot(self) -> dict[str, torch.Tensor]:
        return snapshot(self.model, self.optimizers)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def run(folder) -> Run:
    run = Run(folder)
    run.step()
    return run


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to make a file larger, as it refuses when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_round_trip(run, folder):
    run.save(7)
    assert set(names(folder / "step-00000007")) == FILES
    other = Run(folder, seed=3)
    state = other.load(folder / "step-00000007")
    assert state == TrainState(7, {"offset": 7}, 70, 1, "abc")
    assert_identical(other.snapshot(), run.snapshot())
    for one in (run, other):
        one.step(seed=5)
    assert_identical(other.snapshot(), run.snapshot())


def test_random_states_go_on(run, folder):
    run.save(1)
    expected = torch.rand(5)
    torch.manual_seed(99)
    run.load(folder / "step-00000001")
    assert torch.equal(torch.rand(5), expected)


def test_nothing_is_pickled(run, folder):
    run.save(1)
    for file in (folder / "step-00000001").iterdir():
        first = file.read_bytes()[:9]
        assert file.suffix == ".json" or first[8:9] == b"{", f"{file.name} is no safetensors file"


def test_newest_are_kept(run, folder):
    for step in (5, 10, 15, 20):
        run.save(step)
    assert names(folder) == ["step-00000015", "step-00000020"]


def test_the_newest_is_that_of_the_largest_step(run, folder):
    for step in (99, 100, 9, 1000):
        run.save(step)
    assert names(folder) == ["step-00000100", "step-00001000"]


def test_a_truncated_one_does_not_count_as_kept(run, folder):
    run.save(1)
    run.save(2)
    truncate(folder / "step-00000002" / "model.safetensors")
    run.save(3)
    assert [path.name for path in complete_checkpoints(folder)] == ["step-00000001", "step-00000003"]


def test_saving_a_step_again_replaces_it(run, folder):
    run.save(1)
    first = contents(folder)
    run.step(seed=8)
    run.save(1)
    assert names(folder) == ["step-00000001"]
    assert contents(folder) != first
    other = Run(folder)
    other.load(folder / "step-00000001")
    assert_identical(other.snapshot(), run.snapshot())


@pytest.mark.parametrize("failing", ["model.safetensors", "optimizer.safetensors", "random-0.safetensors"])
def test_failure_while_writing(run, folder, monkeypatch, failing):
    """Half of the file is there when the disk refuses."""
    run.save(1)
    run.save(2)
    before = contents(folder)
    save_file = checkpoints_module.save_file

    def save_half(tensors, path, **options):
        save_file(tensors, path, **options)
        if path.name == failing:
            truncate(path)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints_module, "save_file", save_half)
    with pytest.raises(CheckpointError, match=r"step 3 .*No space left on device; earlier checkpoints are untouched"):
        run.save(3)
    with pytest.raises(CheckpointError):
        run.save(2)
    assert contents(folder) == before
    assert names(folder) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("size", [100, 5_000])
def test_refused_by_the_system(run, folder, size):
    """5,000 bytes are too few for the model; 100 for the first block of it."""
    run.save(1)
    before = contents(folder)
    with files_of_at_most(size), pytest.raises(CheckpointError, match=r"step 2 .*File too large"):
        run.save(2)
    assert contents(folder) == before and names(folder) == ["step-00000001"]
    run.save(2)
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_no_right_to_write(run, folder):
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 was not saved: .* could not be written"):
        run.save(1)


def test_what_a_kill_left_half_written_goes_at_the_next_save(run, folder):
    (folder / ".step-00000004.partial").mkdir(parents=True)
    (folder / ".step-00000004.partial" / "model.safetensors").write_bytes(b"half")
    assert complete_checkpoints(folder) == []
    run.save(5)
    assert names(folder) == ["step-00000005"]


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_truncated(run, folder, name, damage, caplog, monkeypatch):
    run.save(1)
    run.save(2)
    newest = folder / "step-00000002"
    if damage == "truncated":
        truncate(newest / name)
    else:
        (newest / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_state(newest)
    with pytest.raises(CheckpointError, match=name):
        find_checkpoint(folder.parent, str(newest))
    monkeypatch.setattr(logging.getLogger("qlatrain"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="qlatrain"):
        assert find_checkpoint(folder.parent, "auto") == folder / "step-00000001"
    assert "passed over" in caplog.text and str(newest) in caplog.text


def test_state_that_is_not_text(run, folder):
    run.save(1)
    (folder / "step-00000001" / "state.json").write_bytes(b"\xff\xfe\x00{}")
    assert complete_checkpoints(folder) == []


def test_same_size_and_other_content(run, folder):
    """What a size cannot show is found when it is read, and nothing has changed then."""
    run.save(1)
    file = folder / "step-00000001" / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    other = Run(folder, seed=3)
    before = other.snapshot()
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        other.load(folder / "step-00000001")
    assert_identical(other.snapshot(), before)


def test_format_number(run, folder):
    run.save(1)
    state = folder / "step-00000001" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this version reads 1"):
        read_state(folder / "step-00000001")
    assert find_checkpoint(folder.parent, "auto") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 24}, "hidden_size 16 there, 24 here"),
        ({"vocab_size": 31, "intermediate_size": 32}, "vocab_size 29 there, 31 here; intermediate_size 24 there"),
        ({"layer_pattern": ["gdn"]}, r"layers \['gdn', 'attn'\] there, \['gdn', 'gdn'\] here"),
        ({"num_hidden_layers": 4}, "num_hidden_layers 2 there, 4 here"),
        ({"rope_theta": 5.0}, "rope_theta 10000000.0 there, 5.0 here"),
        ({"allow_neg_eigval": True}, "allow_neg_eigval False there, True here"),
    ],
)
def test_another_model(run, folder, changes, said):
    run.save(1)
    other = Run(folder, **changes)
    before = other.snapshot()
    with pytest.raises(CheckpointError, match=f"is a checkpoint of another model .*{said}"):
        other.load(folder / "step-00000001")
    assert_identical(other.snapshot(), before)


def test_the_same_model_described_otherwise(run, folder):
    run.save(1)
    same = {"name": "other", "layer_pattern": ["gdn", "attn", "gdn"], "initializer_range": 0.1}
    other = Run(folder, max_position_embeddings=99, **same)
    other.load(folder / "step-00000001")
    assert_identical(other.snapshot(), run.snapshot())


def test_a_checkpoint_from_before_there_were_architectures(run, folder):
    run.save(1)
    state = folder / "step-00000001" / "state.json"
    content = json.loads(state.read_text())
    del content["model"]["architecture"]
    state.write_text(json.dumps(content))
    other = Run(folder, seed=3)
    other.load(folder / "step-00000001")
    assert_identical(other.snapshot(), run.snapshot())


def test_another_optimizer(run, folder):
    run.save(1)
    other = Run(folder, seed=3, optimizer="adamw")
    before = other.snapshot()
    with pytest.raises(CheckpointError, match="resume with the optimizer it was saved with"):
        other.load(folder / "step-00000001")
    assert_identical(other.snapshot(), before)


def test_what_resume_means(run, folder, tmp_path):
    run_dir = folder.parent
    assert find_checkpoint(run_dir, "auto") is None and find_checkpoint(run_dir, "never") is None
    run.save(1)
    run.save(2)
    assert find_checkpoint(run_dir, "auto") == folder / "step-00000002"
    assert find_checkpoint(run_dir, str(folder / "step-00000001")) == folder / "step-00000001"
    assert find_checkpoint(tmp_path / "elsewhere", str(folder / "step-00000001")) == folder / "step-00000001"
    with pytest.raises(CheckpointError, match=r"resume=never, but .* already holds a run .*step-00000002"):
        find_checkpoint(run_dir, "never")
    with pytest.raises(CheckpointError, match="resume=atuo is not a folder"):
        find_checkpoint(run_dir, "atuo")
    with pytest.raises(CheckpointError, match=r"is not a complete checkpoint: state\.json is missing"):
        find_checkpoint(run_dir, str(folder))
