"""Text from a model, to see what it has learned. For serving, open the checkpoint in transformers, vLLM or SGLang.

Each token reads the whole text again: simple, the same path as training, and fast enough for a few hundred tokens.
"""

import torch

from qlatrain.data import Tokenizer
from qlatrain.models import HybridForCausalLM


@torch.no_grad()
def sample(
    model: HybridForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """`prompt` and up to `tokens` tokens after it, drawn at `temperature` (0: the most likely), to the end token."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer.encode_prompt(prompt).tolist()
    start = len(ids)
    for _ in range(tokens):
        logits = model(torch.tensor([ids], device=device))[0, -1, : tokenizer.vocab_size].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return prompt + tokenizer.decode(ids[start:])
