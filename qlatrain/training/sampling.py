"""Text from a model, to see what it has learned. For serving, open the checkpoint in transformers, vLLM or SGLang.

Each token reads the whole text again: simple, the same path as training, and fast enough for a few hundred tokens.
"""

import numpy as np
import torch

from qlatrain.config import SampleConfig
from qlatrain.data import Tokenizer
from qlatrain.models import HybridForCausalLM


@torch.no_grad()
def sample(model: HybridForCausalLM, tokenizer: Tokenizer, prompt: np.ndarray, config: SampleConfig, seed: int) -> str:
    """What follows the ids `prompt`, up to the end token or config.tokens; temperature 0 takes the likeliest."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = prompt.tolist()
    start = len(ids)
    for _ in range(config.tokens):
        logits = model(torch.tensor([ids], device=device))[0, -1, : tokenizer.vocab_size].float()
        if config.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / config.temperature).softmax(-1), 1, generator=generator))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])
