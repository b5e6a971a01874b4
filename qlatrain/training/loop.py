"""What every training recipe has in common: where it goes on from, its steps, validation, checkpoints and reports.

A recipe makes the model and the data; `Session` stands before them, `TrainingLoop` behind.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from omegaconf import OmegaConf

from qlatrain.config import TrainingConfig
from qlatrain.data import TrainData
from qlatrain.files import make_folder, write_aside, write_json
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.flops import FlopCounter
from qlatrain.metrics.hardware import environment, peak_flops
from qlatrain.metrics.kernel_times import StepProfiler
from qlatrain.metrics.throughput import Throughput
from qlatrain.metrics.trackers import Tracker
from qlatrain.models import HybridForCausalLM
from qlatrain.parallel import Layout
from qlatrain.training.checkpoints import Checkpoints, TrainState, find_checkpoint, read_state
from qlatrain.training.report import ConsoleLog, Report
from qlatrain.training.schedule import learning_rate_factor
from qlatrain.training.step import TrainStep, validation_nll
from qlatrain.training.stopping import StopRequest


@dataclass(frozen=True)
class Session:
    """What is there before a model is: the checkpoint to go on from (None: from the start), the devices, and who is
    told."""

    run_dir: Path
    checkpoint: Path | None
    tracker: Tracker
    layout: Layout
    console: RunConsole
    log: ConsoleLog

    @classmethod
    def begin(cls, config: TrainingConfig) -> Self:
        """Raises CheckpointError, or ValueError, where `resume` or the layout cannot be as asked."""
        run_dir = Path(config.run.dir)
        checkpoint = find_checkpoint(run_dir, config.resume)
        saved = read_state(checkpoint) if checkpoint else {}
        tracker = Tracker(config.track, config.run.name, run_dir, saved.get("tracker_id"), asdict(config))
        layout = Layout(config.parallel, config.train.mixed_precision, tracker.log_with)
        console = RunConsole(layout.is_main)
        log = ConsoleLog(console)
        log.attach()
        torch.manual_seed(config.train.seed)
        return cls(run_dir, checkpoint, tracker, layout, console, log)


class TrainingLoop:
    """Trains a model on data from where its run stands.

    Args:
        session: as begun with the same config.
        model: with its weights, from which a run starts; parameters that ask for no gradient stay as they are.
        data: an open stream, and held-out rows.
        flops: of the model.
        bytes_per_token, bigram: what turns a validation loss into bits per byte, and the baseline it is shown beside;
            None leaves either out.
    """

    def __init__(
        self,
        session: Session,
        config: TrainingConfig,
        model: HybridForCausalLM,
        data: TrainData,
        flops: FlopCounter,
        bytes_per_token: float | None = None,
        bigram: float | None = None,
    ):
        train, layout = config.train, session.layout
        self.session, self.config, self.data, self.bare_model = session, config, data, model
        self.bytes_per_token, self.bigram = bytes_per_token, bigram
        self.validation = data.validation.batches(
            config.validation.rows, train.micro_batch_size, layout.rank, layout.world_size
        )

        # ---------------------------------------------------------------- model and optimizers
        self.train_step = TrainStep.of(model, layout, train, config.optim, flops.step_flops)
        self.model, self.optimizers = self.train_step.model, self.train_step.optimizers

        # ---------------------------------------------------------------- go on
        self.state = TrainState(tracker_id=session.tracker.id)
        self.checkpoints = Checkpoints(session.run_dir / "checkpoints", config.checkpoint.keep, layout)
        if session.checkpoint:
            self.state = self.checkpoints.load(session.checkpoint, model, self.optimizers)
            self.state.tracker_id = session.tracker.id
            data.train.load_state_dict(self.state.data)
            session.console.note(f"going on from {session.checkpoint}, step {self.state.step}")

        # ---------------------------------------------------------------- what will run, said and recorded
        peak = peak_flops(layout.device, torch.bfloat16 if train.mixed_precision == "bf16" else torch.float32)
        if layout.is_main:
            make_folder(session.run_dir)
            write_aside(session.run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
            self._write_environment()
        row_length = config.data.sequence_length
        session.console.banner(
            config.run.name,
            session.run_dir,
            flops.parameters,
            flops.table(row_length),
            [layout.describe()],
            train.described(),
            peak,
            layout.world_size,
        )
        if session.tracker.note:
            session.console.note(session.tracker.note)
        session.tracker.start(layout.accelerator)
        self.throughput = Throughput(peak[0] * layout.world_size)
        self.report = Report(
            session.console,
            session.tracker,
            self.throughput,
            config.run.name,
            session.run_dir,
            self.state,
            train.steps,
            train.global_batch_size * row_length,
            config.track.log_every,
            train.max_skipped_steps,
            late=1 if layout.device.type == "cuda" else 0,
            is_main=layout.is_main,
            resumed_step=self.state.step if session.checkpoint else None,
        )
        self.profiler = StepProfiler(config.metrics.kernel_times_every, layout.device, layout.is_main)

    def run(self) -> bool:
        """Takes the steps that are left and saves; False when it was asked to stop before the last of them."""
        config, state, steps = self.config, self.state, self.config.train.steps
        self.throughput.start()
        with StopRequest() as stop, self.data.train:
            while state.step < steps and not self.report.stop_agreed:
                self._step(stop)
                if config.validation.every and state.step % config.validation.every == 0 and state.step < steps:
                    self.report.flush()
                    self.validate()
                if state.step % config.checkpoint.every == 0 and state.step < steps:
                    self._save()
            self._save()
        if state.step < steps:
            self.report.finish({"stopped at": f"step {state.step} of {steps}; the same command goes on"})
            return False
        return True

    def _step(self, stop: StopRequest) -> None:
        train, layout, state = self.config.train, self.session.layout, self.state
        batches = self.data.train.next_global_batch(
            train.global_batch_size, layout.rank, layout.world_size, train.micro_batch_size
        )
        factor = learning_rate_factor(self.config.schedule, state.step, train.steps)
        state.step += 1
        if not self.profiler.due(state.step):
            result = self.train_step(batches, factor, stop.requested)
            self.report.step(state.step, self.optimizers.learning_rate, result)
            return
        self.report.flush()  # everywhere, so that all processes hear of a stop at the same step
        with self.throughput.pause():
            result, times = self.profiler.run(self.train_step, batches, factor, stop.requested)
        self.report.step(state.step, self.optimizers.learning_rate, result, timed=False)
        self.report.flush()
        self.report.kernel_times(state.step, times)

    def validate(self) -> None:
        with self.throughput.pause():
            nll, targets = validation_nll(self.model, self.validation, self.session.layout)
            self.report.validation(self.state.step, nll, targets, self.bytes_per_token, self.bigram)

    def _save(self) -> None:
        self.report.flush()
        with self.throughput.pause():
            self.state.data = self.data.train.state_dict()
            self.checkpoints.save(self.bare_model, self.optimizers, self.state)

    def finish(self, files: dict[str, Path]) -> None:
        """The summary of the run, with the files that came out of it by name."""
        if self.session.layout.is_main:
            self._write_environment(backends=self.session.log.lines)
        self.report.finish(files)

    def _write_environment(self, **more) -> None:
        step = {"layout": self.session.layout.describe(), "settings": self.config.train.described()}
        facts = environment() | step | more
        write_json(self.session.run_dir / "environment.json", facts)
