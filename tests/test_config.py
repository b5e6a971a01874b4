"""The schema, what it refuses, and that everything under configs/ fits it."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from qlatrain.checks import nearest
from qlatrain.command_line import all_keys, check, register_schemas, to_schema
from qlatrain.config import AT_LEAST, CHOICES, ModelConfig, PretrainConfig
from qlatrain.metrics.flops import FlopCounter
from qlatrain.models import HybridForCausalLM

CONFIGS = Path(__file__).parent.parent / "configs"
GROUPS = ("data", "kernel", "model", "optim", "parallel", "schedule", "track")
OPTIONS = [f"{group}={file.stem}" for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]
MODELS = [option.removeprefix("model=") for option in OPTIONS if option.startswith("model=")]
NEEDED = {  # what an option leaves to the user
    "data=text": ["data.files=[a.txt]"],
    "data=conversations": ["data.files=[a.jsonl]"],
    "data=hf": ["data.dataset=name"],
}
# parameters in millions, of the published models or of what the file's first line says
MILLIONS = {
    "tiny": 1.0,
    "gdn_340m": 340,
    "hybrid_340m": 340,
    "hybrid_1b6": 1650,
    "qwen3_5_0b8": 752,
    "qwen3_5_2b": 1880,
    "qwen3_5_4b": 4200,
    "qwen3_5_9b": 8950,
    "qwen3_5_27b": 26900,
    "olmo_hybrid_7b": 7430,
}

register_schemas()


def composed(*overrides: str) -> PretrainConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_schema(compose("pretrain", list(overrides)))


def leaves(schema: type = PretrainConfig, prefix: str = "") -> dict[str, object]:
    """Key → type, for every key that is not a group."""
    found, hints = {}, get_type_hints(schema)
    for item in fields(schema):
        kind = hints[item.name]
        found |= leaves(kind, f"{prefix}{item.name}.") if is_dataclass(kind) else {prefix + item.name: kind}
    return found


def test_defaults_are_valid():
    config = composed()
    config.validate()
    assert isinstance(config, PretrainConfig) and isinstance(config.model, ModelConfig)
    assert config.run.dir == "runs/pretrain-tiny"


def test_groups_are_those_of_the_schema():
    assert sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir()) == list(GROUPS)
    assert set(GROUPS) < {item.name for item in fields(PretrainConfig)}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option):
    check(CONFIGS, "pretrain", [option, *NEEDED.get(option, [])])
    group, name = option.split("=")
    config = getattr(composed(option), group)
    content = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    for key, value in content.items():
        held = getattr(config, key)
        assert (list(held) if isinstance(value, list) else held) == value
    if hasattr(config, "name"):
        assert config.name == name


@pytest.mark.parametrize("option", NEEDED)
def test_an_option_says_what_it_needs(option):
    source = {"data=text": "text", "data=conversations": "text", "data=hf": "hf"}[option]
    with pytest.raises(ValueError, match=rf"data\.source={source} needs data"):
        check(CONFIGS, "pretrain", [option])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_with_the_parameters_that_are_counted(name):
    config = composed(f"model={name}").model
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == FlopCounter(config).parameters.total
    assert built / 1e6 == pytest.approx(MILLIONS[name], rel=0.1)


KINDS = {int: "integer", float: "float", bool: "bool"}
TYPED = sorted(key for key, kind in leaves().items() if kind in KINDS)


def test_keys():
    assert set(leaves()) < set(all_keys(PretrainConfig))
    assert set(all_keys(PretrainConfig)) - set(leaves()) == {
        item.name for item in fields(PretrainConfig) if is_dataclass(get_type_hints(PretrainConfig)[item.name])
    }
    assert len(TYPED) > 40 and (set(CHOICES) | set(AT_LEAST)) <= set(leaves())


@pytest.mark.parametrize("key", TYPED)
def test_wrong_type(key):
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "pretrain", [f"{key}=wrong"])
    assert str(caught.value) == f"{key}=wrong is not of type {KINDS[leaves()[key]]}"


@pytest.mark.parametrize("key", sorted(key for key, kind in leaves().items() if kind == list[str]))
def test_a_word_where_a_list_belongs(key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)} is a list: write {re.escape(key)}="):
        check(CONFIGS, "pretrain", [f"{key}=word"])


@pytest.mark.parametrize("key", sorted(CHOICES))
def test_unknown_choice(key):
    options = [option for option in CHOICES[key] if option is not None]
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "pretrain", [f"{key}={options[-1]}x"])
    message = str(caught.value)
    assert message.startswith(f"{key}={options[-1]}x is not one of ")
    assert message.endswith(f"; did you mean {options[-1]}?")
    assert all(option in message for option in options)


def test_every_choice_is_taken():
    for key, options in CHOICES.items():
        for option in options:
            needed = {
                "data.source=text": ["data.files=[a.txt]"],
                "data.source=hf": ["data.dataset=name"],
                "model.architecture=olmo_hybrid": ["model.partial_rotary_factor=1"],
                "train.gradient_dtype=bfloat16": ["train.mixed_precision=bf16"],
                "data.format=conversations": ["data=conversations", "data.files=[a.jsonl]"],
            }
            argument = f"{key}={'null' if option is None else option}"
            check(CONFIGS, "pretrain", [argument, *needed.get(argument, [])])


@pytest.mark.parametrize("key", sorted(AT_LEAST))
def test_below_the_least(key):
    least = AT_LEAST[key]
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "pretrain", [f"{key}={least - 1}"])
    assert str(caught.value).startswith(f"{key}={least - 1}") and f"is below {least}" in str(caught.value)


REFUSED = [
    (["train.gradient_dtype=half"], "train.gradient_dtype"),
    (["train.gradient_dtype=bfloat16"], "train.gradient_dtype=bfloat16 needs train.mixed_precision=bf16, not no"),
    (
        ["train.gradient_dtype=bfloat16", "train.global_batch_size=8", "train.micro_batch_size=4"],
        "train.gradient_dtype=bfloat16 would add up micro-batches in half precision",
    ),
    (["train.global_batch_size=6", "train.micro_batch_size=4"], "train.global_batch_size=6 is not a multiple of train"),
    (["train.steps=10", "schedule.warmup_steps=10"], "schedule.warmup_steps=10 leaves nothing of train.steps=10: make"),
    (["schedule.final=1.5"], "schedule.final=1.5 is not between 0 and 1"),
    (["schedule.final=-0.5"], "schedule.final=-0.5 is not between 0 and 1"),
    (["schedule.decay_fraction=2"], "schedule.decay_fraction=2.0 is not between 0 and 1"),
    (["train.max_grad_norm=0"], "train.max_grad_norm=0.0 is not above 0; use inf not to clip"),
    (["data.validation_fraction=1"], "data.validation_fraction=1.0 is not between 0 and 1: it is the part"),
    (["data.validation_fraction=0"], "data.validation_fraction=0.0 is not between 0 and 1: it is the part"),
    (["data.source=text"], "data.source=text needs data.files: a list of paths or globs"),
    (["data.source=hf"], "data.source=hf needs data.dataset: the name or the folder"),
    (["data.format=conversations"], "data.format=conversations needs data.source=text or hf: the standard library"),
    (["data.streaming=true"], "data.streaming=true needs data.source=hf, not stdlib"),
    (["model.layer_pattern=[]"], "model.layer_pattern is empty: give a list of gdn and attn"),
    (
        ["model.layer_pattern=[gdn,att]"],
        "model.layer_pattern holds att, which is not one of gdn, attn; did you mean attn",
    ),
    (
        ["model.linear_num_key_heads=3"],
        "model.linear_num_value_heads=4 is not a multiple of model.linear_num_key_heads=3",
    ),
    (["model.num_key_value_heads=4"], "model.num_attention_heads=2 is not a multiple of model.num_key_value_heads=4"),
    (
        ["model.partial_rotary_factor=0"],
        "model.partial_rotary_factor=0.0 rotates 0 of model.head_dim=64 dimensions: it",
    ),
    (["model.partial_rotary_factor=2"], "model.partial_rotary_factor=2.0 rotates 128 of model.head_dim=64 dimensions"),
    (
        ["model.head_dim=6"],
        "model.partial_rotary_factor=0.5 rotates 3 of model.head_dim=6 dimensions: it must be an even",
    ),
    (["model.rope_theta=null"], "model.rope_theta=null, no positions, needs model.architecture=olmo_hybrid"),
    (
        ["model=olmo_hybrid_7b", "model.layer_pattern=[gdn]"],
        "model.architecture=olmo_hybrid needs layers of both kinds",
    ),
    (
        ["model.architecture=olmo_hybrid"],
        "model.partial_rotary_factor=0.5 is not 1: olmo_hybrid turns heads as a whole",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_combinations_that_cannot_run(overrides, message):
    with pytest.raises(ValueError) as caught:
        check(CONFIGS, "pretrain", overrides)
    assert str(caught.value).startswith(message)


def test_the_edges_are_taken():
    edges = ["train.max_grad_norm=inf", "schedule.final=1", "schedule.warmup_steps=0", "train.steps=1"]
    check(CONFIGS, "pretrain", [*edges, "model.layer_pattern=[attn]", "model.partial_rotary_factor=1"])


def test_layer_kinds():
    config = composed("model.num_hidden_layers=5", "model.layer_pattern=[gdn,attn]").model
    assert config.layer_kinds == ["gdn", "attn", "gdn", "attn", "gdn"]


def test_nearest():
    assert nearest("adamww", ["adamw", "muon"]) == "; did you mean adamw?"
    assert nearest("zzz", ["adamw", "muon"]) == ""
