"""The model as a Hugging Face checkpoint: `config.json` and `model.safetensors` under the names of `qwen3_5_text`.

What is written opens with `AutoModelForCausalLM.from_pretrained` without our code. The one exception is
`allow_neg_eigval`, which that architecture cannot express: such a checkpoint carries a model type of its own, so that
transformers refuses it rather than compute something else.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qlatrain.config import KernelConfig, ModelConfig
from qlatrain.models.hybrid import HybridForCausalLM

MODEL_TYPE = "qwen3_5_text"
MODEL_TYPE_NEG_EIGVAL = "qlatrain_neg_eigval"
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


def to_hf_config(config: ModelConfig, bos_token_id: int | None = None, eos_token_id: int | None = None) -> dict:
    """The content of `config.json`."""
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": MODEL_TYPE_NEG_EIGVAL if config.allow_neg_eigval else MODEL_TYPE,
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
        "dtype": "float32",
        **({"allow_neg_eigval": True} if config.allow_neg_eigval else {}),
    }


def from_hf_config(hf: dict, name: str) -> ModelConfig:
    """Raises ValueError for another family or for an option that this model does not have."""
    if hf.get("model_type") not in (MODEL_TYPE, MODEL_TYPE_NEG_EIGVAL):
        raise ValueError(f"{name} holds a model of type {hf.get('model_type')!r}; give one of type {MODEL_TYPE!r}")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{name} uses hidden_act={hf['hidden_act']!r}; only 'silu' is supported")
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{name} uses rope_type={rope['rope_type']!r}; only 'default' is supported")
    absent = [key for key in ("layer_types", *SAME_NAME) if key not in hf]
    if absent:
        raise ValueError(f"{name}: config.json lacks {', '.join(absent)}")
    kinds = {theirs: ours for ours, theirs in LAYER_TYPES.items()}
    unknown = sorted(set(hf["layer_types"]) - kinds.keys())
    if unknown:
        raise ValueError(f"{name} has layers of type {', '.join(unknown)}; only {', '.join(kinds)} are supported")
    return ModelConfig(
        name=name,
        layer_pattern=[kinds[kind] for kind in hf["layer_types"]],
        rope_theta=rope.get("rope_theta", 10_000.0),
        partial_rotary_factor=rope.get("partial_rotary_factor", 0.25),
        allow_neg_eigval=hf["model_type"] == MODEL_TYPE_NEG_EIGVAL,
        **{key: hf[key] for key in SAME_NAME},
    )


def weights(model: HybridForCausalLM) -> dict[str, torch.Tensor]:
    """Name → tensor, each storage once: a tied head is left out, as transformers does."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def save_pretrained(
    model: HybridForCausalLM, folder: str | Path, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`. The caller makes the whole folder atomic."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = to_hf_config(model.config, bos_token_id, eos_token_id)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights(model), folder / "model.safetensors", metadata={"format": "pt"})


def from_pretrained(folder: str | Path, kernel: KernelConfig | None = None) -> HybridForCausalLM:
    """Opens what `save_pretrained`, or transformers for a `qwen3_5_text` model in one file, has written.

    Raises:
        ValueError: not such a checkpoint, of another family, or with keys missing, left over or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} is not a checkpoint: it needs config.json and model.safetensors")
    config = from_hf_config(json.loads((folder / "config.json").read_text()), str(folder))
    model = HybridForCausalLM(config, kernel)
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
    load_weights(model, state, str(folder))
    return model


def load_weights(model: HybridForCausalLM, state: dict[str, torch.Tensor], source: str) -> None:
    """Copies `state` into the model; nothing is loaded unless every name and shape fits.

    Raises:
        ValueError: listing all that is missing, left over or of another shape.
    """
    own = weights(model)
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    faults = [("missing", missing), ("left over", extra), ("of another shape", shapes)]
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults if names)
    if told:
        raise ValueError(f"{source} does not fit the model: {told}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
