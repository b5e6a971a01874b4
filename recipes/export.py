"""Export a run: its newest checkpoint → a Hugging Face checkpoint (or a LoRA adapter) with tokenizer and model card."""

from pathlib import Path

from qlatrain.config import ExportConfig
from qlatrain.data import load_tokenizer, read_chat_template
from qlatrain.files import folder_written_aside
from qlatrain.metrics.console import RunConsole
from qlatrain.models import copy_serving_files, save_pretrained
from qlatrain.models.lora import has_lora, merge_lora, save_adapter
from qlatrain.training.finished import FinishedRun, check_format, dtype_named, model_card


def main(config: ExportConfig) -> None:
    console = RunConsole()

    # ---------------------------------------------------------------- what the run came to
    run = FinishedRun.read(Path(config.run), config.checkpoint)
    check_format(config.format, run)
    model = run.model()
    template = run.data.chat_template
    tokenizer = load_tokenizer(run.data.tokenizer, None if template is None else read_chat_template(template))
    if has_lora(model) and config.merge:
        merge_lora(model)

    # ---------------------------------------------------------------- written
    with folder_written_aside(Path(config.out)) as folder:
        if has_lora(model):
            save_adapter(model, folder)
        else:
            source = run.base if config.format in (None, "qwen3_5") else None
            ids = (None, None) if run.base else (tokenizer.bos_id, tokenizer.eos_id)
            save_pretrained(model, folder, *ids, source=source, dtype=dtype_named(config.dtype))
            if run.base:
                copy_serving_files(run.base, folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(run, has_lora(model)), encoding="utf-8")
    console.note(f"{run.checkpoint} (step {run.step}) written to {config.out}")
