"""Finetune a Hugging Face hybrid, whole or by LoRA: a checkpoint, and text or conversations → steps → a checkpoint."""

from pathlib import Path

import torch

from qlatrain.config import FinetuneConfig
from qlatrain.data import build_data, check_vocab
from qlatrain.files import folder_written_aside, write_aside
from qlatrain.metrics.flops import FlopCounter
from qlatrain.models import checkpoint_config, copy_serving_files, from_pretrained, save_pretrained
from qlatrain.models.lora import add_lora, lora_parameters, save_adapter
from qlatrain.training.loop import Session, TrainingLoop
from qlatrain.training.sampling import sample


def main(config: FinetuneConfig) -> None:
    seed, sampling, lora = config.train.seed, config.sample, config.lora
    checkpoint = Path(config.init.checkpoint)

    checkpoint_config(checkpoint)  # before anything takes time

    # ---------------------------------------------------------------- where to go on from, and on which devices
    session = Session.begin(config)
    run_dir = session.run_dir

    # ---------------------------------------------------------------- documents or conversations
    data = build_data(config.data, seed)
    tokenizer = data.tokenizer

    # ---------------------------------------------------------------- model
    model = from_pretrained(checkpoint, config.kernel, session.layout.device, getattr(torch, config.init.dtype))
    check_vocab(tokenizer, model.config.vocab_size, str(checkpoint))
    if lora.rank:
        add_lora(model, lora, seed, str(checkpoint))

    # ---------------------------------------------------------------- train
    loop = TrainingLoop(session, config, model, data, FlopCounter(model.config, lora_parameters(model)))
    if loop.state.step == 0:
        loop.validate()  # what the checkpoint knows already
    if not loop.run():
        return

    # ---------------------------------------------------------------- what came out
    loop.validate()
    counts = data.train.counts
    if data.chat:
        session.console.note(
            f"conversations in rows: {counts.packed:,}, {counts.cut:,} of them cut at the end of a row; left out: "
            f"{counts.dropped:,}; rows filled: {counts.fill:.1%}"
        )
    result = run_dir / ("adapter" if lora.rank else "model")
    if session.layout.is_main:
        with folder_written_aside(result) as folder:
            if lora.rank:
                save_adapter(model, folder)
            else:
                save_pretrained(model, folder, source=checkpoint)
                copy_serving_files(checkpoint, folder)
            tokenizer.save_pretrained(folder)
        texts = []
        for prompt in sampling.prompts:
            asked = [{"role": "user", "content": prompt}]
            ids = data.chat.encode_prompt(asked) if data.chat else tokenizer.encode_prompt(prompt)
            texts.append(f"{prompt}\n{sample(model, tokenizer, ids, sampling, seed)}")
        write_aside(run_dir / "samples.txt", "\n\n────\n\n".join(texts) + "\n")
    loop.finish({result.name: result, "picture": run_dir / "loss.png", "samples": run_dir / "samples.txt"})
