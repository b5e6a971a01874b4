"""Pretrain a hybrid from scratch: documents → packed rows → steps → a Hugging Face checkpoint."""

from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from qlatrain.config import PretrainConfig
from qlatrain.data import build_data, check_vocab
from qlatrain.files import folder_written_aside, make_folder, write_aside, write_json
from qlatrain.metrics.bigram import BigramByteModel
from qlatrain.metrics.console import RunConsole
from qlatrain.metrics.flops import FlopCounter
from qlatrain.metrics.hardware import environment, peak_flops
from qlatrain.metrics.kernel_times import StepProfiler
from qlatrain.metrics.throughput import Throughput
from qlatrain.metrics.trackers import Tracker
from qlatrain.models import HybridForCausalLM, save_pretrained
from qlatrain.parallel import Layout
from qlatrain.training.checkpoints import Checkpoints, TrainState, find_checkpoint, read_state
from qlatrain.training.optimizer import Optimizers
from qlatrain.training.report import ConsoleLog, Report
from qlatrain.training.sampling import sample
from qlatrain.training.schedule import learning_rate_factor
from qlatrain.training.step import TrainStep, validation_nll
from qlatrain.training.stopping import StopRequest

BIGRAM_BYTES = 50_000_000  # of training text that the baseline is fitted on


def main(config: PretrainConfig) -> None:
    train, run_dir = config.train, Path(config.run.dir)

    # ---------------------------------------------------------------- where to go on from, and on which devices
    checkpoint = find_checkpoint(run_dir, config.resume)
    saved = read_state(checkpoint) if checkpoint else {}
    tracker = Tracker(config.track, config.run.name, run_dir, saved.get("tracker_id"), asdict(config))
    layout = Layout(config.parallel, train.mixed_precision, tracker.log_with)
    console = RunConsole(layout.is_main)
    log = ConsoleLog(console)
    log.attach()
    torch.manual_seed(train.seed)

    # ---------------------------------------------------------------- documents
    data = build_data(config.data, train.seed)
    check_vocab(data.tokenizer, config.model.vocab_size)
    validation = data.validation.batches(config.validation.rows, train.micro_batch_size, layout.rank, layout.world_size)
    bytes_per_token = data.validation.bytes_per_token(config.validation.rows)

    # ---------------------------------------------------------------- model and optimizers
    bare_model = HybridForCausalLM(config.model, config.kernel, seed=train.seed)
    bare_model.model.activation_checkpointing = train.activation_checkpointing
    if train.compile:
        for block in bare_model.model.layers:
            block.compile()
    model = layout.prepare(bare_model)
    optimizers = Optimizers(list(bare_model.named_parameters()), config.optim)

    # ---------------------------------------------------------------- go on
    state = TrainState(tracker_id=tracker.id)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep, layout)
    if checkpoint:
        state = checkpoints.load(checkpoint, bare_model, optimizers)
        state.tracker_id = tracker.id
        data.train.load_state_dict(state.data)
        console.note(f"going on from {checkpoint}, step {state.step}")

    # ---------------------------------------------------------------- what will run, said and recorded
    flops = FlopCounter(config.model)
    peak = peak_flops(layout.device, torch.bfloat16 if train.mixed_precision == "bf16" else torch.float32)
    bigram = BigramByteModel(data.train.documents(BIGRAM_BYTES)).bits_per_byte(data.validation.documents())
    if layout.is_main:
        make_folder(run_dir)
        write_aside(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_json(run_dir / "environment.json", environment() | {"layout": layout.describe()})
    rows_length = config.data.sequence_length
    console.banner(
        config.run.name,
        run_dir,
        flops.parameters,
        flops.table(rows_length),
        [layout.describe()],
        peak,
        layout.world_size,
    )
    if tracker.note:
        console.note(tracker.note)
    tracker.start(layout.accelerator)
    throughput = Throughput(peak[0] * layout.world_size)
    report = Report(
        console,
        tracker,
        throughput,
        config.run.name,
        run_dir,
        state,
        train.steps,
        train.global_batch_size * rows_length,
        config.track.log_every,
        train.max_skipped_steps,
        late=1 if layout.device.type == "cuda" else 0,
        is_main=layout.is_main,
        resumed_step=state.step if checkpoint else None,
    )
    train_step = TrainStep(model, optimizers, layout, train.max_grad_norm, flops.step_flops)
    profiler = StepProfiler(config.metrics.kernel_times_every, layout.device, layout.is_main)

    def profiled_step(step: int, *arguments) -> None:
        report.flush()  # everywhere, so that all processes hear of a stop at the same step
        with throughput.pause():
            result, times = profiler.run(train_step, *arguments)
        report.step(step, optimizers.learning_rate, result, timed=False)
        report.flush()
        report.kernel_times(step, times)

    def validate() -> None:
        with throughput.pause():
            report.validation(state.step, *validation_nll(model, validation, layout), bytes_per_token, bigram)

    def save() -> None:
        report.flush()
        with throughput.pause():
            state.data = data.train.state_dict()
            checkpoints.save(bare_model, optimizers, state)

    # ---------------------------------------------------------------- train
    throughput.start()
    with StopRequest() as stop, data.train:
        while state.step < train.steps and not report.stop_agreed:
            batches = data.train.next_global_batch(
                train.global_batch_size, layout.rank, layout.world_size, train.micro_batch_size
            )
            factor = learning_rate_factor(config.schedule, state.step, train.steps)
            state.step += 1
            if profiler.due(state.step):
                profiled_step(state.step, batches, factor, stop.requested)
            else:
                result = train_step(batches, factor, stop.requested)
                report.step(state.step, optimizers.learning_rate, result)
            if config.validation.every and state.step % config.validation.every == 0 and state.step < train.steps:
                report.flush()
                validate()
            if state.step % config.checkpoint.every == 0 and state.step < train.steps:
                save()
        save()
    if state.step < train.steps:
        report.finish({"stopped at": f"step {state.step} of {train.steps}; the same command goes on"})
        return

    # ---------------------------------------------------------------- what came out
    validate()
    if layout.is_main:
        with folder_written_aside(run_dir / "model") as folder:
            save_pretrained(bare_model, folder, data.tokenizer.bos_id, data.tokenizer.eos_id)
            data.tokenizer.save_pretrained(folder)
        texts = [
            sample(bare_model, data.tokenizer, prompt, config.sample.tokens, config.sample.temperature, train.seed)
            for prompt in config.sample.prompts
        ]
        write_aside(run_dir / "samples.txt", "\n\n────\n\n".join(texts) + "\n")
        write_json(run_dir / "environment.json", environment() | {"layout": layout.describe(), "backends": log.lines})
    report.finish({"model": run_dir / "model", "picture": run_dir / "loss.png", "samples": run_dir / "samples.txt"})
