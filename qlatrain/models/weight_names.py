"""Names of parameters ↔ names of tensors in the files of a checkpoint.

Parameters carry the names that transformers gives them in its modules; its files differ from those in two families:

- `qwen3_5` keeps the text model under `model.language_model.`, beside `model.visual.` and `mtp.`; transformers writes
  the prefix for a `qwen3_5_text` model too, when it was taken out of a multimodal checkpoint.
- `olmo_hybrid` has `attention_layer_norm` and `feedforward_layer_norm` for the two norms of a Gated DeltaNet block, and
  q's, k's and v's part of `conv1d` as three tensors. Transformers cuts these at thirds of the channels and gives the
  norm behind attention the second name as well; all of that is read, and the names of the released models are written.
"""

from qlatrain.config import ModelConfig
from qlatrain.models.hf_config import OLMO, QWEN, QWEN_TEXT

TEXT_HALF = "model.language_model."
BESIDE_THE_TEXT = {QWEN: ("model.visual.", "mtp."), QWEN_TEXT: ("mtp.",)}  # family → prefixes of what is not loaded
OLMO_NORMS = {".attention_layer_norm.": ".input_layernorm.", ".feedforward_layer_norm.": ".post_attention_layernorm."}
CONV, CONV_PARTS = ".conv1d.", (".q_conv1d.", ".k_conv1d.", ".v_conv1d.")


def is_beside_the_text(stored: str, model_type: str) -> bool:
    """Whether a tensor belongs to a part of the checkpoint that is no part of the model."""
    return stored.startswith(BESIDE_THE_TEXT.get(model_type, ()))


def parameter_of(stored: str, model_type: str) -> tuple[str, int]:
    """Tensor in a file → parameter, and its place among the tensors that make it up, stacked along the first axis."""
    if model_type != OLMO:
        return stored.replace(TEXT_HALF, "model.", 1) if stored.startswith(TEXT_HALF) else stored, 0
    for theirs, ours in OLMO_NORMS.items():
        stored = stored.replace(theirs, ours)
    for place, part in enumerate(CONV_PARTS):
        if part in stored:
            return stored.replace(part, CONV), place
    return stored, 0


def stored_as(name: str, config: ModelConfig, model_type: str) -> list[tuple[str, int | None]]:
    """Parameter → the tensors that a file holds for it: name, and how many of its rows; None: all."""
    if model_type == QWEN and name.startswith("model."):
        return [(TEXT_HALF + name.removeprefix("model."), None)]
    if model_type != OLMO:
        return [(name, None)]
    if CONV in name:
        key_dim = config.linear_num_key_heads * config.linear_key_head_dim
        value_dim = config.linear_num_value_heads * config.linear_value_head_dim
        return [
            (name.replace(CONV, part), rows)
            for part, rows in zip(CONV_PARTS, (key_dim, key_dim, value_dim), strict=True)
        ]
    layer = name.removeprefix("model.layers.").split(".")[0]
    if layer.isdigit() and config.layer_kinds[int(layer)] == "gdn":
        for theirs, ours in OLMO_NORMS.items():
            name = name.replace(ours, theirs)
    return [(name, None)]
