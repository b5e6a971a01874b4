"""Finetuning and export, from a pretrained checkpoint to answers in plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers import models
from training_runs import Trainer, losses, metric_rows, repeatable
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

NAMES = ("anna", "bert", "carl", "dora", "emil", "fran", "gus", "hana")
WIDER = ("model.hidden_size=64", "model.intermediate_size=128", "model.linear_key_head_dim=32", "train.steps=8")
SHORT = (
    "data.chat_template=bos_eos",
    "data.sequence_length=128",
    "data.workers=0",
    "train.steps=8",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "schedule.warmup_steps=2",
    "checkpoint.every=4",
    "validation.every=0",
    "validation.rows=4",
    "optim.lr=3e-3",
)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """The checkpoint of a short pretraining run."""
    folder = tmp_path_factory.mktemp("base")
    done = Trainer(corpus, folder / "output").run(folder / "run", *WIDER)
    assert done.code == 0, done.err
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Who has which number, each told twenty times."""
    turns = [[("user", f"who is number {i}?"), ("assistant", f"{name}.")] for i, name in enumerate(NAMES)]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in turn]}) for turn in turns]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("\n".join(lines * 20) + "\n")
    return path


@pytest.fixture
def finetune(trainer, base, chats):
    def run(run_dir: Path, *changes: str):
        return trainer.recipe(
            "finetune", f"init.checkpoint={base}", f"data.files=[{chats}]", f"run.dir={run_dir}", *SHORT, *changes
        )

    return run


@pytest.fixture(scope="module")
def lora_run(corpus, base, chats, tmp_path_factory) -> Path:
    """Eight steps of LoRA, not to be changed."""
    folder = tmp_path_factory.mktemp("lora")
    arguments = (f"init.checkpoint={base}", f"data.files=[{chats}]", f"run.dir={folder / 'run'}", *SHORT)
    done = Trainer(corpus, folder / "output").recipe("finetune", *arguments, "lora.rank=4", "lora.alpha=8")
    assert done.code == 0, done.err
    return folder / "run"


def export(trainer, run_dir: Path, out: Path, *changes: str) -> Path:
    done = trainer.recipe("export", f"run={run_dir}", f"out={out}", *changes)
    assert done.code == 0, done.err
    return out


def test_answers_in_transformers(finetune, trainer, tmp_path):
    run_dir = tmp_path / "run"
    done = finetune(run_dir, "train.steps=120", "train.global_batch_size=8", "train.micro_batch_size=8")
    assert done.code == 0, done.err
    validations = [float(row["validation_loss"]) for row in metric_rows(run_dir) if "validation_loss" in row]
    assert validations[0] > 2 and validations[-1] < 0.1  # before the first step, and after the last
    assert "rows filled: " in done.out and "left out: 0" in done.out

    folder = export(trainer, run_dir, tmp_path / "export")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "120 of 120" in card and "base_model: " in card
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for i, name in enumerate(NAMES):
        asked = [{"role": "user", "content": f"who is number {i}?"}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        given = model.generate(**ids, max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(given[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == f"{name}."


def test_what_a_run_leaves(finetune, tmp_path):
    run_dir = tmp_path / "run"
    assert finetune(run_dir, "sample.prompts=[who is number 3?]", "sample.tokens=3").code == 0
    assert {"config.yaml", "metrics.jsonl", "loss.png", "environment.json", "samples.txt", "model"} <= {
        path.name for path in run_dir.iterdir()
    }
    assert (run_dir / "samples.txt").read_text().startswith("who is number 3?\n")
    assert "bigram" not in (run_dir / "metrics.jsonl").read_text()


def test_on_documents(trainer, base, corpus, tmp_path):
    arguments = [x for x in SHORT if not x.startswith("data.chat_template")]
    files = [f"init.checkpoint={base}", f"data.files=[{corpus}/*.txt]", f"run.dir={tmp_path / 'run'}"]
    done = trainer.recipe("finetune", "data=text", *files, *arguments, "data.validation_fraction=0.2")
    assert done.code == 0, done.err
    assert len(losses(tmp_path / "run")) == 8


@pytest.mark.parametrize("lora", [(), ("lora.rank=2", "lora.dropout=0.1")], ids=["whole", "lora"])
def test_resumed_run_is_the_same(lora, finetune, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert finetune(whole, *lora).code == 0
    shutil.copytree(whole / "checkpoints" / "step-00000004", resumed / "checkpoints" / "step-00000004")
    shutil.copy(whole / "metrics.jsonl", resumed / "metrics.jsonl")
    done = finetune(resumed, *lora)
    assert done.code == 0, done.err
    assert "going on from" in done.out
    assert repeatable(resumed) == repeatable(whole)


# ---------------------------------------------------------------- LoRA


def test_only_updates_are_trained_and_kept(lora_run, base):
    kept = load_file(lora_run / "checkpoints" / "step-00000008" / "model.safetensors")
    assert kept and all(".lora_A." in name or ".lora_B." in name for name in kept)
    assert {name.split(".")[3] for name in kept} == {"linear_attn", "self_attn", "mlp"}
    assert all(x.abs().max() > 0 for x in kept.values())


def logits(model) -> torch.Tensor:
    ids = torch.arange(3, 80)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def test_adapter_opens_in_peft_and_merged_is_the_same(lora_run, base, trainer, tmp_path):
    import peft

    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    adapted = logits(peft.PeftModel.from_pretrained(plain, lora_run / "adapter"))
    assert (adapted - before).abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(export(trainer, lora_run, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-5, atol=1e-5)
    theirs, ours = AutoModelForCausalLM.from_pretrained(base).state_dict(), merged.state_dict()
    changed = {name for name, x in theirs.items() if not torch.equal(x, ours[name])}
    projections = ("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight")
    assert changed and all(".layers." in name and name.endswith(projections) for name in changed)
    assert not any(name.endswith(("in_proj_a.weight", "in_proj_b.weight")) for name in changed)

    exported = export(trainer, lora_run, tmp_path / "adapter", "merge=false")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported)
    assert torch.equal(logits(again), adapted)
    assert "library_name: peft" in (exported / "README.md").read_text()


# ---------------------------------------------------------------- export of other runs


def test_pretraining_run_in_bfloat16(trainer, finished_run, tmp_path):
    folder = export(trainer, finished_run, tmp_path / "export", "dtype=bfloat16", "format=qwen3_5_text")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ours = load_file(finished_run / "model" / "model.safetensors")
    assert theirs.dtype == torch.bfloat16
    assert all(torch.equal(x, ours[name].to(x.dtype)) for name, x in theirs.state_dict().items() if name in ours)
    assert "from scratch" in (folder / "README.md").read_text()


# ---------------------------------------------------------------- bad input


def refused(done, *words: str) -> None:
    assert done.code != 0
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err


def test_a_tokenizer_that_does_not_fit(finetune, tmp_path):
    backend = Backend(models.WordLevel({f"w{i}": i for i in range(400)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w1", eos_token="w2").save_pretrained(tmp_path / "own")
    refused(finetune(tmp_path / "run", f"data.tokenizer={tmp_path / 'own'}"), "400 tokens", "320", "init.checkpoint=")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["init.checkpoint=nowhere"], ["nowhere is not a checkpoint"]),
        (["init.checkpoint=???"], ["init.checkpoint has no value"]),
        (["lora.rank=2", "lora.targets=[atention]"], ["lora.targets holds atention", "did you mean attention"]),
        (["lora.rank=2", "lora.targets=[]"], ["lora.targets is empty"]),
        (["lora.rank=-1"], ["lora.rank=-1"]),
        (["lora.rank=2", "lora.alpha=0"], ["lora.alpha=0"]),
        (["lora.dropout=1.0"], ["lora.dropout=1.0"]),
        (["init.dtype=float16"], ["init.dtype=float16", "bfloat16"]),
        (["model=tiny"], ["model"]),
    ],
)
def test_bad_settings(changes, words, finetune, tmp_path):
    refused(finetune(tmp_path / "run", *changes), *words)
    assert not (tmp_path / "run" / "model").exists()


def test_bad_exports(trainer, lora_run, finished_run, tmp_path):
    out = f"out={tmp_path / 'out'}"
    refused(trainer.recipe("export"), "run has no value")
    refused(trainer.recipe("export", "run=nowhere", out), "run=nowhere is not the folder of a run")
    (tmp_path / "empty").mkdir()
    shutil.copy(finished_run / "config.yaml", tmp_path / "empty")
    refused(trainer.recipe("export", f"run={tmp_path / 'empty'}", out), "no complete checkpoint")
    refused(
        trainer.recipe("export", f"run={lora_run}", "format=olmo_hybrid", out), "format=olmo_hybrid", "qwen3_5_text"
    )
    refused(trainer.recipe("export", f"run={lora_run}", "format=gpt2", out), "format=gpt2", "qwen3_5_text")
    refused(trainer.recipe("export", f"run={lora_run}", "checkpoint=nowhere", out), "nowhere")
    assert not (tmp_path / "out").exists()
