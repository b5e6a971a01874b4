"""The hybrid decoder: layers that follow a pattern of Gated DeltaNet and full attention.

Parameter names are those of transformers' `Qwen3_5ForCausalLM` or `OlmoHybridForCausalLM`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlakernels import compiled
from qlakernels.backends import select
from qlakernels.operators import name_of
from qlakernels.precompile import of_a_model
from qlakernels.residual_norm import api as residual_norm
from qlatrain.config import KernelConfig, ModelConfig
from qlatrain.models.attention import path_of, say
from qlatrain.models.documents import Documents, with_rows
from qlatrain.models.head import embed_tied, linear_cross_entropy
from qlatrain.models.initialization import initialize
from qlatrain.models.joint import Joint, cast_dtype, joints
from qlatrain.models.layers import MLP, Block, DeltaRuleMixer, RMSNorm, normed, rotary_table
from qlatrain.models.olmo_hybrid import OlmoRMSNorm, olmo_block

LOGITS_AT_ONCE = 2**26  # elements of float32 logits held at a time: 256 MB


class Architecture(NamedTuple):
    block: Callable[..., nn.Module]  # (config, kind of layer, backend of the gated delta rule)
    norm: Callable[..., nn.Module]  # (width, epsilon), in front of the head
    float32_rotary: bool  # cosines and sines stay float32, rather than take the dtype of the hidden states


ARCHITECTURES = {
    "qwen3_5": Architecture(Block, RMSNorm, float32_rotary=False),
    "olmo_hybrid": Architecture(olmo_block, OlmoRMSNorm, float32_rotary=True),
}


class HybridModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig, kernel: KernelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.architecture = ARCHITECTURES[config.architecture]
        block, norm = self.architecture.block, self.architecture.norm
        self.layers = nn.ModuleList(block(config, kind, kernel.gated_delta_rule) for kind in config.layer_kinds)
        self.norm = norm(config.hidden_size, config.rms_norm_eps)
        self.joints = joints(self)
        self.mixers = [part for part in self.modules() if isinstance(part, DeltaRuleMixer)]
        self.mlps = [part for part in self.modules() if isinstance(part, MLP)]

    def forward(self, input_ids: torch.Tensor, documents, embedded_BTD: torch.Tensor | None = None) -> torch.Tensor:
        """embedded_BTD: of the tokens, where the caller has them."""
        x_BTD = self.embed_tokens(input_ids) if embedded_BTD is None else embedded_BTD
        documents = with_rows(documents)
        dtype = cast_dtype(x_BTD.device.type)
        for joint in self.joints:
            joint.refresh(dtype)
        if dtype is not None:
            x_BTD = x_BTD.to(dtype)  # the residual stream; statistics of norms are float32 in any case
            for part in (*self.mixers, *self.mlps):
                part.decide(x_BTD)
            say(path_of(x_BTD.is_cuda, dtype, documents.rows), x_BTD.device.type, dtype)
        select(residual_norm.OPERATOR, "auto", residual_norm.call_of(x_BTD))  # not in the trace of a block
        rotary = self.rotary(documents.position_ids, x_BTD.dtype)
        delta_BTD = None  # what is yet to be added to x
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = x_BTD if delta_BTD is None else x_BTD + delta_BTD  # one tensor is kept, not two
                x_BTD, delta_BTD = checkpoint(layer, x_BTD, None, documents, rotary, use_reentrant=False)
            else:
                x_BTD, delta_BTD = layer(x_BTD, delta_BTD, documents, rotary)
        return normed(self.norm, x_BTD, delta_BTD)[1]

    def rotary(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The table of all layers; None for a model without positions."""
        config = self.config
        if config.rope_theta is None:
            return None
        dtype = torch.float32 if self.architecture.float32_rotary else dtype
        return rotary_table(position_ids, config.head_dim, config.partial_rotary_factor, config.rope_theta, dtype)


class HybridForCausalLM(nn.Module):
    """The decoder with its head.

    Args:
        config: sizes and pattern.
        kernel: which backend each operator runs.
        seed: initialise from this seed; None leaves the parameters unset, for a checkpoint to fill.
    """

    def __init__(self, config: ModelConfig, kernel: KernelConfig | None = None, seed: int | None = None):
        super().__init__()
        self.config = config
        # parameters that will be filled here need not be filled by torch's modules before
        with torch.device("meta") if seed is not None else nullcontext():
            self.model = HybridModel(config, kernel or KernelConfig())
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_config: dict = {}  # of the checkpoint it was loaded from, for what `ModelConfig` does not hold
        if seed is not None:
            self.to_empty(device=torch.get_default_device())
            initialize(self, config, seed)
        self.joint_head = Joint(self, "lm_head")
        self.tie_head()

    def traced_whole(self, device: torch.device, dtype: torch.dtype | None) -> bool:
        """Whether blocks will be traced without a break: under autocast to this dtype on a GPU, with mixers of one
        operator and no adapters."""
        if device.type != "cuda" or dtype is None:
            return False
        plain = all(joint.plain for joint in self.model.joints)
        return plain and all(mixer.is_one_operator(device, dtype) for mixer in self.model.mixers)

    def load_kernels(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Compiles, side by side, what training will need one after the other; nothing where `traced_whole` is not."""
        if self.model.mixers and self.traced_whole(device, dtype):
            heads = self.model.mixers[0].heads
            compiled.load(of_a_model(heads.key_dim, heads.value_dim, self.config.hidden_size, name_of(dtype)))

    def tie_head(self) -> None:
        """Makes the head the embedding itself where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, documents=None, labels: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            input_ids: int64 [1, N] with documents, or [B, T], each row one document.
            documents: `Documents` (or a `PackedBatch`): boundaries and positions along N.
            labels: int64 like input_ids, the token each position predicts; −100 where there is none.

        Returns:
            logits [1, N, vocabulary] (or [B, T, vocabulary]); with labels the sum of their negative log-likelihoods
            in float32, without ever holding all logits of a large vocabulary.
        """
        shape = input_ids.shape
        if documents is None:
            documents = Documents.of_lengths([shape[1]] * shape[0], input_ids.device)
            input_ids = input_ids.flatten()[None]
        elif input_ids.shape != documents.position_ids.shape:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}, the documents' position_ids "
                f"{list(documents.position_ids.shape)}: pack the tokens into [1, N]"
            )
        self.joint_head.refresh(cast_dtype(input_ids.device.type))
        weight, cast, embedded_BTD = self.lm_head.weight, self.joint_head.cast, None
        if cast is not None and labels is not None and self.model.embed_tokens.weight is weight:
            embedded_BTD, weight = embed_tied(input_ids, weight, cast)
        x_BTD = self.model(input_ids, documents, embedded_BTD)
        if labels is None:
            return self.joint_head.apart(x_BTD)[0].view(*shape, -1)
        if cast is not None:
            return linear_cross_entropy(x_BTD.flatten(0, 1), labels.flatten(), weight, cast)
        return self._nll(x_BTD.flatten(0, 1), labels.flatten())

    def _nll(self, x_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """Logits are made, used and dropped a slice of tokens at a time; the backward makes them again."""
        tokens = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if tokens >= len(x_ND):
            return self._slice_nll(x_ND, labels_N)
        slices = zip(x_ND.split(tokens), labels_N.split(tokens), strict=True)
        return torch.stack([checkpoint(self._slice_nll, x, y, use_reentrant=False) for x, y in slices]).sum()

    def _slice_nll(self, x_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.lm_head(x_ND).float(), labels_N, ignore_index=-100, reduction="sum")
