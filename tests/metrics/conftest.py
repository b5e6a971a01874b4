import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))  # for `training_helpers`

from qlatrain.config import ModelConfig


@pytest.fixture
def small_config() -> ModelConfig:
    """Six layers of odd sizes, no two dimensions equal, so that a swapped pair shows in a count."""
    return ModelConfig(
        name="small",
        vocab_size=301,
        hidden_size=48,
        intermediate_size=104,
        num_hidden_layers=6,
        layer_pattern=["gdn", "gdn", "attn"],
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=24,
        linear_value_head_dim=40,
        linear_conv_kernel_dim=4,
        tie_word_embeddings=False,
    )
