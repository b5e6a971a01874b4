"""How weights start, and where each choice comes from.

| parameter | start | source |
|---|---|---|
| embedding, linear layers | N(0, initializer_range) | transformers `Qwen3_5PreTrainedModel` |
| out_proj, o_proj, down_proj | the same, divided by √(2 · layers) | Radford et al. 2019 (GPT-2) |
| convolution | U(−1/√width, 1/√width) | torch's `nn.Conv1d` for one channel a group, as Mamba and FLA |
| A_log | log of U(0.01, 16), drawn in float32 | Dao & Gu 2024 (Mamba-2), kept away from 0 as in transformers |
| dt_bias | softplus⁻¹ of exp U(log 0.001, log 0.1) | Gu & Dao 2023 (Mamba): time steps spread over two decades |
| zero-centred norms | 0 | transformers |
| other norms | 1 | transformers |

OLMo-Hybrid starts as OLMo-core's `InitMethod.normal`, which trained it: N(0, initializer_range) for every matrix,
whatever the depth, as the norm behind a layer undoes its scale, and for the convolutions too.
"""

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from qlatrain.config import ModelConfig
from qlatrain.models.layers import DeltaRuleMixer, GatedRMSNorm, RMSNorm, ShortConvolution
from qlatrain.models.olmo_hybrid import OlmoRMSNorm

RESIDUAL_OUTPUTS = ("out_proj", "o_proj", "down_proj")
A_RANGE = (0.01, 16.0)
DT_RANGE = (0.001, 0.1)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter in place, drawing on the CPU: each from `seed` and its own name alone, on as many threads
    as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        filled = [pool.submit(_fill, name, module, config, seed) for name, module in model.named_modules()]
        for future in filled:
            future.result()


def generator_of(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


@torch.no_grad()
def _fill(name: str, module: nn.Module, config: ModelConfig, seed: int) -> None:
    """The parameters of a module itself."""
    generator = generator_of(seed, name)

    def normal_(weight: torch.Tensor, std: float) -> None:
        weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))

    def uniform(shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32).uniform_(low, high, generator=generator)

    olmo = config.architecture == "olmo_hybrid"
    if isinstance(module, nn.Linear):
        residual = name.rsplit(".", 1)[-1] in RESIDUAL_OUTPUTS and not olmo
        depth = math.sqrt(2 * config.num_hidden_layers) if residual else 1.0
        normal_(module.weight, config.initializer_range / depth)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.Embedding) or (olmo and isinstance(module, ShortConvolution)):
        normal_(module.weight, config.initializer_range)
    elif isinstance(module, ShortConvolution):
        bound = module.weight.shape[-1] ** -0.5
        module.weight.copy_(uniform(module.weight.shape, -bound, bound))
    elif isinstance(module, DeltaRuleMixer):
        module.A_log.copy_(uniform(module.A_log.shape, *A_RANGE).log())
        dt = uniform(module.dt_bias.shape, math.log(DT_RANGE[0]), math.log(DT_RANGE[1])).exp()
        module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
    elif isinstance(module, RMSNorm):
        module.weight.zero_()
    elif isinstance(module, GatedRMSNorm | OlmoRMSNorm):
        module.weight.fill_(1.0)
