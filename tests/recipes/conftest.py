import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "metrics")]

from training_runs import Trainer, write_corpus  # noqa: E402


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Twelve small text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def trainer(corpus, tmp_path):
    """Starts runs over `corpus`, and ends what a failed test has left running."""
    trainer = Trainer(corpus, tmp_path / "output")
    yield trainer
    trainer.end_all()


@pytest.fixture(scope="module")
def finished_run(corpus, tmp_path_factory):
    """A run of 12 steps that nothing disturbed, with a checkpoint at 4, 8 and 12; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    done = Trainer(corpus, folder / "output").run(folder / "run", "checkpoint.keep=3")
    assert done.code == 0, done.err
    return folder / "run"
