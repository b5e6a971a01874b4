"""Low-rank updates of a model's projections, by peft: added, saved as an adapter that peft opens, merged.

Source: Hu et al. 2021, LoRA (arXiv 2106.09685): W + alpha / rank · B A, with A [rank, in] and B [out, rank], zero at
first.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from qlatrain.config import LoraConfig
from qlatrain.models.hybrid import HybridForCausalLM

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in an adapter that peft saves
# The projections from one to a few dozen numbers a token, for the gates, are left as they are.
PROJECTIONS = {
    "attention": r"self_attn\.(q|k|v|o)_proj",
    "gdn": r"linear_attn\.(in_proj_qkv|in_proj_z|out_proj|q_proj|k_proj|v_proj|g_proj|o_proj)",
    "mlp": r"mlp\.(gate|up|down)_proj",
}


def add_lora(model: HybridForCausalLM, config: LoraConfig, seed: int, base: str) -> None:
    """Puts an update beside each projection that `config` targets; from then on nothing else is trained.

    Args:
        model: changed in place. The updates are float32, on the device of what they are added to.
        seed: of the first A, the same on every process.
        base: where the checkpoint came from, for whoever opens the adapter.
    """
    peft = _peft()
    targets = "|".join(PROJECTIONS[target] for target in config.targets)
    updates = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=rf".*\.({targets})",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(updates, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "lora.rank above 0 needs peft, which is not installed: pip install 'qlatrain[lora]'"
        ) from error
    return peft


def has_lora(model: nn.Module) -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


def lora_parameters(model: nn.Module) -> int:
    """Numbers in all updates."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)


def save_adapter(model: HybridForCausalLM, folder: str | Path) -> None:
    """Writes what `peft.PeftModel.from_pretrained(model, folder)` opens. The caller makes the folder atomic."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(str(folder))
    state = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {PREFIX + name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def merge_lora(model: HybridForCausalLM) -> None:
    """Adds every update to its projection, in float32, and takes it away."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _peft().tuners.lora.LoraLayer):
            weight = module.get_base_layer().weight
            with torch.no_grad():
                weight.copy_(weight.float() + module.get_delta_weight("default").float())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    model.requires_grad_(True)
