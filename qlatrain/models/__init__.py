"""Hybrid decoders and their Hugging Face form."""

from qlatrain.models.documents import Documents
from qlatrain.models.huggingface import checkpoint_config, from_pretrained, save_pretrained
from qlatrain.models.hybrid import HybridForCausalLM
from qlatrain.models.serving_files import copy_serving_files

__all__ = [
    "Documents",
    "HybridForCausalLM",
    "checkpoint_config",
    "copy_serving_files",
    "from_pretrained",
    "save_pretrained",
]
