"""`config.json` of the families that open here, and the `ModelConfig` that says the same.

| model_type | what it is |
|---|---|
| `qwen3_5_text` | a Qwen3.5 text model |
| `qwen3_5` | the multimodal checkpoint, whose text half, under `text_config`, is the model |
| `olmo_hybrid` | OLMo-Hybrid |
| `qlatrain_neg_eigval` | ours: `qwen3_5_text` with negative eigenvalues, which transformers cannot run and refuses |
"""

import json
from pathlib import Path
from typing import get_type_hints

from qlatrain.config import FAMILIES, ModelConfig, validate_model

QWEN_TEXT, QWEN, OLMO = FAMILIES
NEG_EIGVAL = "qlatrain_neg_eigval"
MIXTURES = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")
LAYER_TYPES = {"gdn": "linear_attention", "attn": "full_attention"}
SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "max_position_embeddings",
)
MAY_BE_LEFT_OUT = {"attention_bias": False, "initializer_range": 0.02, "tie_word_embeddings": False}
TYPES = {int: (int,), float: (int, float), bool: (bool,), list: (list,)}


def read_config(folder: Path) -> dict:
    """The content of `config.json`, of a family that opens here.

    Raises:
        ValueError: no such file, broken, or of another family.
    """
    path = folder / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(hf, dict):
        raise ValueError(f"{path} holds no JSON object: it must be the config.json of a checkpoint")
    _check_family(hf, str(folder))
    return hf


def text_config(hf: dict, name: str) -> dict:
    """The config of the text model: `hf` itself, or the half of a multimodal one, its head tied as in the whole."""
    if hf.get("model_type") != QWEN:
        return hf
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{name}: config.json of a {QWEN} model lacks text_config")
    tied = hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return text | {"model_type": QWEN_TEXT, "tie_word_embeddings": tied}


def from_hf_config(hf: dict, name: str) -> ModelConfig:
    """Raises ValueError for another family or for an option that this model does not have."""
    _check_family(hf, name)
    hf = MAY_BE_LEFT_OUT | text_config(hf, name)
    olmo = hf["model_type"] == OLMO
    absent = [key for key in ("layer_types", *SAME_NAME) if hf.get(key) is None and not (olmo and key == "head_dim")]
    if absent:
        raise ValueError(f"{name}: config.json lacks {', '.join(absent)}")
    _check_values(hf, name)
    rope = _rope(hf, name)
    if hf.get("head_dim") is None:
        hf["head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
    config = ModelConfig(
        name=name,
        architecture=OLMO if olmo else QWEN,
        layer_pattern=_layer_pattern(hf["layer_types"], name),
        rope_theta=rope["rope_theta"],
        partial_rotary_factor=1.0 if olmo else rope["partial_rotary_factor"],
        allow_neg_eigval=hf.get("linear_allow_neg_eigval", True) if olmo else hf["model_type"] == NEG_EIGVAL,
        **{key: hf[key] for key in SAME_NAME},
    )
    if len(config.layer_pattern) != config.num_hidden_layers:
        raise ValueError(
            f"{name}: config.json has {len(config.layer_pattern)} layer_types for "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    try:
        validate_model(config)
    except ValueError as error:
        raise ValueError(f"{name}: config.json does not describe a model: {error}") from error
    return config


def to_hf_config(
    config: ModelConfig, bos_token_id: int | None = None, eos_token_id: int | None = None, dtype: str = "float32"
) -> dict:
    """The content of `config.json` for a text model on its own."""
    olmo = config.architecture == OLMO
    hf = {
        "architectures": ["OlmoHybridForCausalLM" if olmo else "Qwen3_5ForCausalLM"],
        "model_type": OLMO if olmo else NEG_EIGVAL if config.allow_neg_eigval else QWEN_TEXT,
        **{name: getattr(config, name) for name in SAME_NAME},
        "layer_types": [LAYER_TYPES[kind] for kind in config.layer_kinds],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.partial_rotary_factor,
        },
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
    }
    if olmo:
        del hf["rope_parameters"]["partial_rotary_factor"]
        hf |= {"linear_allow_neg_eigval": config.allow_neg_eigval, "pad_token_id": None}  # their default is an id
        if config.head_dim * config.num_attention_heads == config.hidden_size:
            del hf["head_dim"]
    elif config.allow_neg_eigval:
        hf["allow_neg_eigval"] = True
    return hf


def kept_config(
    kept: dict, config: ModelConfig, bos_token_id: int | None, eos_token_id: int | None, dtype: str
) -> dict:
    """`to_hf_config` over the config of the checkpoint the model came from, which may hold more than we model.

    kept: that config, {} for a new model. Of a multimodal one nothing but the dtype and the token ids changes.
    """
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    ids = {name: value for name, value in ids.items() if value is not None}
    if kept.get("model_type") == QWEN:
        text = kept["text_config"] | ids
        if "dtype" in text:
            text["dtype"] = dtype
        return {name: x for name, x in kept.items() if name != "torch_dtype"} | {"text_config": text, "dtype": dtype}
    ours = to_hf_config(config, dtype=dtype)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_cache"):
        if name in kept:
            ours.pop(name, None)
    ours["rope_parameters"] = (kept.get("rope_parameters") or {}) | ours["rope_parameters"]
    ours |= {name: getattr(config, name) for name in ("rope_theta", "partial_rotary_factor") if name in kept}
    older = ("torch_dtype", "rope_scaling")  # now dtype and rope_parameters
    return {name: value for name, value in kept.items() if name not in older} | ours | ids


def _check_family(hf: dict, name: str) -> None:
    model_type = hf.get("model_type")
    if model_type in MIXTURES or "moe" in str(model_type):
        raise ValueError(
            f"{name} holds a mixture of experts ({model_type!r}), and those are not there yet; give one of type "
            + _listed(FAMILIES)
        )
    if model_type not in (*FAMILIES, NEG_EIGVAL):
        raise ValueError(f"{name} holds a model of type {model_type!r}; give one of type {_listed(FAMILIES)}")


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"


def _rope(hf: dict, name: str) -> dict:
    """rope_theta and partial_rotary_factor, which older checkpoints keep outside of `rope_parameters`."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name}: config.json has rope_parameters={rope!r}, which cannot be")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"{name} uses rope_type={rope_type!r}; only 'default' is supported")
    outside = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    values = {key: rope.get(key, hf.get(key, value)) for key, value in outside.items()}
    for key, value in values.items():
        if type(value) not in (int, float, type(None)):
            raise ValueError(f"{name}: config.json has {key}={value!r}, which cannot be")
    return values


def _layer_pattern(layer_types: list[str], name: str) -> list[str]:
    kinds = {theirs: ours for ours, theirs in LAYER_TYPES.items()}
    unknown = sorted(set(map(str, layer_types)) - kinds.keys())
    if unknown:
        raise ValueError(f"{name} has layers of type {', '.join(unknown)}; only {', '.join(kinds)} are supported")
    return [kinds[kind] for kind in layer_types]


def _check_values(hf: dict, name: str) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{name} uses hidden_act={hf['hidden_act']!r}; only 'silu' is supported")
    hints = get_type_hints(ModelConfig)
    kinds = {key: hints[key] for key in SAME_NAME} | {"linear_allow_neg_eigval": bool, "layer_types": list}
    for key, kind in kinds.items():
        value = hf.get(key)
        if value is not None and (type(value) not in TYPES[kind] or (kind is int and value < 1)):
            raise ValueError(f"{name}: config.json has {key}={value!r}, which cannot be")
