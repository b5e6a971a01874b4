"""Hybrid decoders and their Hugging Face form."""

from qlatrain.models.documents import Documents
from qlatrain.models.huggingface import from_pretrained, save_pretrained
from qlatrain.models.hybrid import HybridForCausalLM

__all__ = ["Documents", "HybridForCausalLM", "from_pretrained", "save_pretrained"]
