"""Checkpoints of a run: written aside and renamed, the newest few kept, nothing unpickled.

    checkpoints/step-00000100/
        model.safetensors          what is trained, under its Hugging Face names
        optimizer.safetensors      `<parameter>/<kind>`
        random-<rank>.safetensors  random generator states of each process
        state.json                 step, data position, counters, tracker id, model config, and the sizes of the files

`state.json` is written last and lists the size of every other file: a folder whose files do not match it is truncated.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlatrain.config import ModelConfig
from qlatrain.files import WriteError, folder_written_aside, write_json
from qlatrain.models.huggingface import load_weights, trained_weights
from qlatrain.models.hybrid import HybridForCausalLM
from qlatrain.parallel import Layout
from qlatrain.training.optimizer import Optimizers

logger = logging.getLogger(__name__)
FORMAT = 1
# config fields that may differ between a checkpoint and the run that goes on from it
FREE_FIELDS = ("name", "initializer_range", "max_position_embeddings")


@dataclass
class TrainState:
    """All of a run that is not a tensor."""

    step: int = 0  # optimizer steps taken
    data: dict | None = None  # position in the documents
    tokens: int = 0  # target tokens seen
    skipped: int = 0  # steps left out for a non-finite gradient
    tracker_id: str | None = None


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, why and what to do."""


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        folder: `<run.dir>/checkpoints`.
        keep: how many of the newest stay.
        layout: knows the processes.
    """

    def __init__(self, folder: Path, keep: int, layout: Layout):
        self.folder = folder
        self.keep = keep
        self.layout = layout

    def save(self, model: HybridForCausalLM, optimizers: Optimizers, state: TrainState) -> None:
        """Raises CheckpointError when the disk refuses; earlier checkpoints stay as they are."""
        target = self.folder / f"step-{state.step:08d}"
        random_states = self._gather_random_states()
        error = None
        if self.layout.is_main:
            try:
                self._write(target, model, optimizers, state, random_states)
                self._drop_old()
            except (OSError, WriteError) as caught:
                error = caught
        self.layout.wait_for_everyone()
        if error is not None:
            raise CheckpointError(
                f"the checkpoint of step {state.step} was not saved: {error}; earlier checkpoints are untouched"
            ) from error

    def _write(self, target, model, optimizers, state, random_states) -> None:
        with folder_written_aside(target) as aside:
            save_file(trained_weights(model), aside / "model.safetensors", metadata={"format": "pt"})
            optimizer_state = {name: value.detach().contiguous() for name, value in optimizers.state().items()}
            save_file(optimizer_state, aside / "optimizer.safetensors")
            for rank, states in enumerate(random_states):
                save_file(states, aside / f"random-{rank}.safetensors")
            sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
            content = {"format": FORMAT, **asdict(state), "model": asdict(model.config), "files": sizes}
            write_json(aside / "state.json", content)

    def _drop_old(self) -> None:
        for folder in complete_checkpoints(self.folder)[: -self.keep]:
            folder.rename(folder.parent / f".{folder.name}.dropped")  # killed in between, it is no half checkpoint
        for folder in self.folder.glob(".step-*"):  # those, and what a killed run left half written
            shutil.rmtree(folder)

    def _gather_random_states(self) -> list[dict[str, torch.Tensor]]:
        own = {"torch": torch.get_rng_state()}
        if self.layout.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state()
        if self.layout.world_size == 1:
            return [own]
        gathered: list = [None] * self.layout.world_size
        torch.distributed.all_gather_object(gathered, own)
        return gathered

    def load(self, folder: Path, model: HybridForCausalLM, optimizers: Optimizers) -> TrainState:
        """Fills model, optimizers and the random generators from a checkpoint; nothing changes unless all of it fits.

        Raises:
            CheckpointError: truncated, of another model or another optimizer.
        """
        content = read_state(folder)
        _check_same_model(content["model"], model.config, folder)
        try:
            own = load_file(folder / "model.safetensors")
            optimizer_state = load_file(folder / "optimizer.safetensors")
            random_file = folder / f"random-{self.layout.rank}.safetensors"
            random_state = load_file(random_file) if random_file.exists() else {}
            optimizers.load_state(optimizer_state)
            load_weights(model, own, str(folder))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{folder} cannot be resumed from: {error}") from error
        if "torch" in random_state:
            torch.set_rng_state(random_state["torch"])
        if "cuda" in random_state and self.layout.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"])
        return TrainState(**{name: content[name] for name in TrainState.__dataclass_fields__})


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first; one that is truncated is named in the log and left alone."""
    found = []
    for checkpoint in sorted(folder.glob("step-*")):
        try:
            read_state(checkpoint)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
        else:
            found.append(checkpoint)
    return found


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """What to go on from: `auto` the newest complete checkpoint of the run, `never` nothing, else the path given.

    Raises:
        CheckpointError: the path is no checkpoint, or `never` would write over a run that has some.
    """
    if resume in ("auto", "never"):
        newest = next(reversed(complete_checkpoints(run_dir / "checkpoints")), None)
        if newest and resume == "never":
            raise CheckpointError(
                f"resume=never, but {run_dir} already holds a run (newest checkpoint {newest.name}): "
                "choose another run.dir, or resume=auto to go on with it"
            )
        return newest
    folder = Path(resume)
    if not folder.is_dir():
        raise CheckpointError(f"resume={resume} is not a folder: give the path of a checkpoint, auto or never")
    read_state(folder)
    return folder


def read_state(folder: Path) -> dict:
    """The content of a checkpoint's `state.json`, after checking the files it lists.

    Raises:
        CheckpointError: not a checkpoint, of an unknown format, or truncated.
    """
    try:
        content = json.loads((folder / "state.json").read_text())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder} has checkpoint format {content['format']}, this version reads {FORMAT}")
        files = content["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: state.json is missing or broken") from error
    for name, size in files.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            has = "is missing" if actual is None else f"has {actual} of {size} bytes"
            raise CheckpointError(f"{folder} is truncated: {name} {has}; resume from another checkpoint")
    return content


def _check_same_model(saved: dict, config: ModelConfig, folder: Path) -> None:
    current = asdict(config)
    saved = {"architecture": "qwen3_5"} | saved  # checkpoints from before there was another one do not name it
    other = [
        f"{name} {saved.get(name)} there, {value} here"
        for name, value in current.items()
        if name not in FREE_FIELDS and name != "layer_pattern" and saved.get(name) != value
    ]
    depth = saved["num_hidden_layers"]
    kinds = [saved["layer_pattern"][i % len(saved["layer_pattern"])] for i in range(depth)]
    if kinds != config.layer_kinds:
        other.append(f"layers {kinds} there, {config.layer_kinds} here")
    if other:
        raise CheckpointError(
            f"{folder} is a checkpoint of another model ({'; '.join(other)}): "
            "choose its model config, another run.dir, or resume=never in a new run.dir"
        )
