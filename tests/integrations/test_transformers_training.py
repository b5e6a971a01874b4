"""transformers' Trainer and peft's adapters with qlakernels inside: the same losses, step by step."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers_helpers import FAMILIES, assert_same, loss_and_gradients, small_model, tokens

from qlatrain.integrations.transformers import use_qlatrain_kernels

STEPS = 10
LENGTHS = [12, 70, 3, 31]


class Documents(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        document = tokens(LENGTHS[index % len(LENGTHS)], seed=index)
        return {"input_ids": document, "labels": document}


def padded(documents: list[dict]) -> dict[str, torch.Tensor]:
    input_ids = pad_sequence([document["input_ids"] for document in documents], batch_first=True)
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(input_ids == 0, -100),
        "attention_mask": (input_ids != 0).long(),
    }


packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def losses(model: torch.nn.Module, collator, folder, **arguments) -> list[float]:
    """Ten steps of two documents each; the loss of each step over all its targets."""
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            optim="sgd",
            learning_rate=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
            **arguments,
        ),
        train_dataset=Documents(),
        data_collator=collator,
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """LoRA on every projection, none of its matrices zero, and the gated norms trained as copies."""
    targets = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in targets if "linear_attn" in name or "self_attn" in name]
    norms = ["linear_attn.norm", "linear_attn.o_norm"]
    norms = [norm for norm in norms if any(name.endswith(norm) for name, _ in model.named_modules())]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=norms))
    random = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) / 10
    return wrapped


@pytest.mark.parametrize(
    "family, collator",
    [("qwen3_5", padded), *((family, packed) for family in FAMILIES)],
    ids=["qwen3_5-padded", *(f"{family}-packed" for family in FAMILIES)],
)
def test_the_trainer(family, collator, tmp_path, calls):
    """Padded rows through transformers' functions against the same documents, padded or packed, through ours."""
    expected = losses(small_model(family, use_cache=False), padded, tmp_path)
    assert not calls
    model = small_model(family, use_cache=False)
    with use_qlatrain_kernels(model, backend="torch"):
        got = losses(model, collator, tmp_path)
    assert calls["chunk_gated_delta_rule"] == 2 * STEPS
    assert len(got) == STEPS and len(set(got)) == STEPS
    assert got == pytest.approx(expected, rel=1e-5)


def test_the_trainer_with_adapters_and_checkpointing(tmp_path, calls):
    expected = losses(with_adapters(small_model("qwen3_5", use_cache=False)), padded, tmp_path)
    model = with_adapters(small_model("qwen3_5", use_cache=False))
    with use_qlatrain_kernels(model, backend="torch"):
        got = losses(model, padded, tmp_path, gradient_checkpointing=True)
    assert calls["chunk_gated_delta_rule"] == 2 * 2 * STEPS
    assert got == pytest.approx(expected, rel=1e-5) and got[0] != got[2]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_adapters(family, when, calls):
    """Whether the model is wrapped first or its kernels replaced first. peft's copies of norms run through ours too."""
    input_ids = tokens(2, 40)
    inputs = {"input_ids": input_ids, "labels": input_ids}
    expected = loss_and_gradients(with_adapters(small_model(family)), **inputs)
    assert sum("modules_to_save" in name for name in expected[1]) == 2
    model = small_model(family)
    if when == "after":
        model = with_adapters(model)
    with use_qlatrain_kernels(model, backend="torch"):
        if when == "before":
            model = with_adapters(model)
        # the large gradients, of which the same rounding is a smaller part, are those of frozen weights
        assert_same(loss_and_gradients(model, **inputs), expected, tolerance=2e-5)
        assert set(calls.values()) == {2} and len(calls) == 3
    assert_same(loss_and_gradients(model, **inputs), expected, tolerance=1e-7)
    assert calls.total() == 6
