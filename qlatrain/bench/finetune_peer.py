"""The peer of the finetuning benchmark: transformers' `Trainer` on the rows of our recipe.

Full finetuning as its users do it: float32 weights under bf16 autocast, fused AdamW, no gradient checkpointing, eager.
The rows of a pass are one packed sequence with the boundaries of its conversations, as `DataCollatorWithFlattening`
makes them. FLA runs the gated delta rule where it is installed, and may hand it to FlashQLA.
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qlatrain.bench.finetune_job import FinetuneJob
from qlatrain.bench.finetune_process import step_figures
from qlatrain.bench.fla_dispatch import FlaDispatch
from qlatrain.bench.step_models import transformers_arguments, transformers_note
from qlatrain.command_line import register_schemas, to_schema
from qlatrain.config import FinetuneConfig
from qlatrain.data import IGNORE_INDEX, PackedBatch, build_data


def peer_loader(job: FinetuneJob) -> Callable[[], PreTrainedModel]:
    """What loads the checkpoint in float32, on a GPU by the way that does not keep a copy on the host; the code of the
    model has been imported."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(job.checkpoint))]
    return partial(
        model_class.from_pretrained,
        job.checkpoint,
        dtype=torch.float32,
        attn_implementation="sdpa",
        device_map={"": 0} if job.on_gpu else None,
    )


def finetune_peer(job: FinetuneJob) -> dict:
    """Figures of the timed steps, as of `finetune_process.finetune_ours`."""
    dispatch = FlaDispatch.switched_on()
    has_fla = importlib.util.find_spec("fla") is not None and job.on_gpu
    if not job.on_gpu:
        torch.set_flush_denormal(True)  # as `Layout` does
    config = recipe_config(job)
    optim, clock = config.optim, StepClock(job.on_gpu)
    arguments = TrainingArguments(
        output_dir=job.run_dir,
        max_steps=config.train.steps,
        per_device_train_batch_size=1,  # an item is all rows of a pass
        gradient_accumulation_steps=job.rows_per_step // job.micro_rows,
        train_sampling_strategy="sequential",
        bf16=job.mixed_precision == "bf16",
        use_cpu=not job.on_gpu,
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
        lr_scheduler_type="constant",
        seed=job.seed,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it waits for the device in every pass
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=peer_loader(job)(),
        args=arguments,
        data_collator=lambda passes: model_arguments(passes[0], kept_apart=has_fla),
        train_dataset=packed_rows(config),
        callbacks=[clock],
    )
    trained = trainer.train()
    note = transformers_note(has_fla, packed=True)
    if has_fla:
        note += f"; FLA chose {', '.join(dispatch.choices) or 'its own kernels'}"
    return step_figures(job, clock.seconds(), [trained.training_loss]) | {"backends": "", "note": note}


def recipe_config(job: FinetuneJob) -> FinetuneConfig:
    """What `train.py` makes of the same arguments."""
    register_schemas()
    with initialize_config_dir(str(Path(job.root, "configs")), version_base="1.3"):
        return to_schema(compose("finetune", job.overrides))


def packed_rows(config: FinetuneConfig) -> list[PackedBatch]:
    """The rows that the recipe trains on, in its order, one item for each pass through the model."""
    train = config.train
    with build_data(config.data, train.seed).train as stream:
        steps = [
            stream.next_global_batch(train.global_batch_size, micro_rows=train.micro_batch_size)
            for _ in range(train.steps)
        ]
    return [batch for batches in steps for batch in batches]


def model_arguments(batch: PackedBatch, kept_apart: bool) -> dict:
    """
    Args:
        batch: rows, of which the model takes all at once.
        kept_apart: boundaries for the GDN layers, which only FLA's kernels can take; attention has them from the
            positions either way.
    """
    # they move labels by one themselves: what a position predicts belongs to the one behind it
    labels = F.pad(batch.labels[:, :-1], (1, 0), value=IGNORE_INDEX)
    packed = transformers_arguments(batch) if kept_apart else {"position_ids": batch.position_ids}
    return {"input_ids": batch.input_ids, "labels": labels, **packed}


class StepClock(TrainerCallback):
    """The time of each step: on a GPU between events behind the steps, which nobody waits for before the end."""

    def __init__(self, on_gpu: bool):
        self._on_gpu, self._marks = on_gpu, []

    def on_train_begin(self, *_, **__) -> None:
        self._mark()

    def on_step_end(self, *_, **__) -> None:
        self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every step; the first begins with the training."""
        if not self._on_gpu:
            return [after - before for before, after in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._marks)]
