"""Floating-point operations of a training step of a hybrid, counted by layer type.

A multiply and an add are two operations. Counted are the matrix products the model needs and the short
convolution; the rule for each is written at the function that applies it. Work done twice (activation
checkpointing, states recomputed in a kernel's backward) is never counted: this is the numerator of MFU, not a
measure of how busy the device was.

Counts of the Gated DeltaNet operator follow the chunked algorithm of Yang, Kautz and Hatamizadeh, "Gated Delta
Networks" (arXiv 2412.06464, section 3.3), with chunks of 64 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlatrain.config import LAYER_KINDS, ModelConfig

CHUNK = 64  # tokens a chunk of the Gated DeltaNet operator
GDN_BACKWARD = 2.5  # backward products of the operator per forward product: five C×C×V or K×V products for every two
MATMUL_BACKWARD = 2.0  # gradient of the input and of the weight
FROZEN_BACKWARD = 1.0  # of the input alone

COUNTED = (
    "linear projections and MLP: 2 x parameters per token; backward 2x",
    "short convolution: 2 x kernel x channels per token; backward 2x",
    f"Gated DeltaNet: chunk algebra with chunks of {CHUNK}, K K^T and Q K^T once per key head; backward 2.5x",
    "attention: Q K^T and P V over the causal mask of each document; backward 2x",
    "output head: 2 x hidden x vocabulary per token; backward 2x",
)
NOT_COUNTED = (
    "embedding look-up",
    "norms, activations, gates, rotary embedding, softmax, biases, the inverse inside a chunk",
    "loss, gradient clipping, optimizer",
    "anything computed twice (activation checkpointing, recomputed states)",
)


def gdn_operator_flops(
    key_heads: int, value_heads: int, key_head_dim: int, value_head_dim: int, chunk: int = CHUNK
) -> int:
    """Forward FLOPs per token of the chunked gated delta rule, all heads together.

    Per token and key head, shared by the value heads of its group: K Kᵀ and Q Kᵀ, 2·C·K each.
    Per token and value head: K S, Q S and the state update Kᵀ V', 2·K·V each; A · (β (V - γ K S)) and
    (Γ ∘ Q Kᵀ) V', 2·C·V each.

    C×C products are counted whole, as the kernels compute them, although half of each is masked away; a chunk cut
    short by the end of a document costs its tokens' share of a whole one. 163,840 per value head at K = V = 128 and
    one value head a key head; 147,456 at two.
    """
    shared = 2 * (2 * chunk * key_head_dim)
    own = 3 * (2 * key_head_dim * value_head_dim) + 2 * (2 * chunk * value_head_dim)
    return key_heads * shared + value_heads * own


@dataclass(frozen=True)
class Part:
    """One kind of work in the model, over all layers that do it."""

    name: str
    layers: int
    parameters: int
    flops_per_token: float  # forward; for attention scores: per (query, key) pair the mask lets through
    backward: float  # backward FLOPs per forward FLOP
    per_pair: bool = False


@dataclass(frozen=True)
class FlopRow:
    """A line of the table printed once at the start of a run."""

    part: str
    layers: int
    parameters: int
    forward_flops_per_token: float
    train_flops_per_token: float  # forward + backward
    share: float  # of train_flops_per_token, 0..1


@dataclass(frozen=True)
class FlopTable:
    """FLOPs per token by part, at a mean attended length of (mean_document_length + 1) / 2."""

    rows: list[FlopRow]
    mean_document_length: float
    forward_flops_per_token: float
    train_flops_per_token: float
    counted: tuple[str, ...] = COUNTED
    not_counted: tuple[str, ...] = NOT_COUNTED


@dataclass(frozen=True)
class ParameterCounts:
    """`total = embedding + head + non_embedding`; a tied head adds nothing."""

    total: int
    embedding: int
    head: int
    non_embedding: int


class FlopCounter:
    """Counts FLOPs and parameters of the model a `ModelConfig` describes, without building it.

    adapter_parameters: numbers in low-rank updates, which alone are trained where there are some: no gradient of any
        other weight is counted then.
    Raises `ValueError` for a kind of layer it has no rule for.
    """

    def __init__(self, model_config: ModelConfig, adapter_parameters: int = 0):
        kinds = model_config.layer_kinds
        if unknown := set(kinds) - set(LAYER_KINDS):
            raise ValueError(f"no FLOP rule for layer kinds {sorted(unknown)}; known kinds: {list(LAYER_KINDS)}")
        self.parts = _parts(model_config, kinds.count("gdn"), kinds.count("attn"), frozen=adapter_parameters > 0)
        if adapter_parameters:
            per_token = 2 * adapter_parameters
            self.parts.append(Part("low-rank updates", len(kinds), adapter_parameters, per_token, MATMUL_BACKWARD))
        self._per_token = sum(p.flops_per_token * (1 + p.backward) for p in self.parts if not p.per_pair)
        self._per_pair = sum(p.flops_per_token * (1 + p.backward) for p in self.parts if p.per_pair)

    def step_flops(self, document_lengths: Sequence[int]) -> float:
        """Forward + backward FLOPs of a batch.

        document_lengths: tokens of each document segment in the batch, any order; a list of ints or an integer
            array or CPU tensor of one dimension. Segments of length 0 are allowed. Padding is left out by the caller.
        Raises `ValueError` for a negative length or a non-integer dtype.
        """
        tokens, pairs = _tokens_and_pairs(document_lengths)
        return self._per_token * tokens + self._per_pair * pairs

    def table(self, mean_document_length: float) -> FlopTable:
        """FLOPs per token by part, for documents that are all `mean_document_length` tokens long.

        Documents of mixed lengths attend to more than this says, because long ones hold most of the tokens;
        `step_flops` takes the real lengths.
        """
        if mean_document_length < 1:
            raise ValueError(f"mean_document_length is {mean_document_length}; it must be at least 1 token")
        pairs = (mean_document_length + 1) / 2
        forward = [p.flops_per_token * (pairs if p.per_pair else 1) for p in self.parts]
        train = [f * (1 + p.backward) for p, f in zip(self.parts, forward, strict=True)]
        rows = [
            FlopRow(p.name, p.layers, p.parameters, f, t, t / sum(train))
            for p, f, t in zip(self.parts, forward, train, strict=True)
        ]
        return FlopTable(rows, mean_document_length, sum(forward), sum(train))

    @property
    def parameters(self) -> ParameterCounts:
        """Parameters: all, the embedding table, an untied output head, and the rest."""
        by_name = {p.name: p.parameters for p in self.parts}
        total = sum(by_name.values())
        embedding, head = by_name["embedding"], by_name["output head"]
        return ParameterCounts(total, embedding, head, total - embedding - head)


def _tokens_and_pairs(document_lengths: Sequence[int]) -> tuple[int, int]:
    """Tokens, and (query, key) pairs under the causal mask: a document of n tokens has n (n + 1) / 2."""
    lengths = np.asarray(document_lengths)
    if lengths.size == 0:
        return 0, 0
    if not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"document_lengths has dtype {lengths.dtype}; give whole numbers of tokens")
    lengths = lengths.astype(np.int64)
    if lengths.min() < 0:
        raise ValueError(f"document_lengths holds {lengths.min()}; a length cannot be negative")
    return int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())


def _parts(c: ModelConfig, gdn: int, attn: int, frozen: bool) -> list[Part]:
    """Every part of a model with `gdn` Gated DeltaNet layers and `attn` full attention layers.

    Architectures differ in attention alone: that of olmo_hybrid has no output gate and norms all heads at once. What
    Qwen projects to q, k and v at once olmo_hybrid does with three matrices of the same size together.

    frozen: no weight is trained.
    """
    hidden, layers = c.hidden_size, gdn + attn

    key_dim = c.linear_num_key_heads * c.linear_key_head_dim
    value_dim = c.linear_num_value_heads * c.linear_value_head_dim
    conv = (2 * key_dim + value_dim) * c.linear_conv_kernel_dim
    # in_proj_qkv, in_proj_z, in_proj_b and in_proj_a, out_proj
    gdn_proj = hidden * (2 * key_dim + value_dim) + 2 * hidden * value_dim + 2 * hidden * c.linear_num_value_heads
    gdn_operator = gdn_operator_flops(
        c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
    )
    gdn_small = 2 * c.linear_num_value_heads + c.linear_value_head_dim  # A_log, dt_bias, output norm

    query_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    if c.architecture == "olmo_hybrid":
        projected, attn_small = query_dim + 2 * kv_dim, query_dim + kv_dim  # q, k, v; q_norm, k_norm
    else:
        projected, attn_small = 2 * query_dim + 2 * kv_dim, 2 * c.head_dim  # q_proj holds the output gate too
    attn_proj = hidden * projected + query_dim * hidden
    if c.attention_bias:
        attn_small += projected + hidden
    scores = 2 * 2 * query_dim  # per pair: Q Kᵀ and P V

    mlp = 3 * hidden * c.intermediate_size
    vocabulary = c.vocab_size * hidden
    norms = (2 * layers + 1) * hidden
    small = gdn * gdn_small + attn * attn_small + norms

    m = FROZEN_BACKWARD if frozen else MATMUL_BACKWARD
    return [
        Part("embedding", 1, vocabulary, 0, m),
        Part("GDN projections", gdn, gdn * gdn_proj, gdn * 2 * gdn_proj, m),
        Part("GDN short convolution", gdn, gdn * conv, gdn * 2 * conv, m),
        Part("GDN operator", gdn, 0, gdn * gdn_operator, GDN_BACKWARD),
        Part("attention projections", attn, attn * attn_proj, attn * 2 * attn_proj, m),
        Part("attention scores", attn, 0, attn * scores, MATMUL_BACKWARD, per_pair=True),
        Part("MLP", layers, layers * mlp, layers * 2 * mlp, m),
        Part("norms, decay, biases", layers, small, 0, m),
        Part("output head", 1, 0 if c.tie_word_embeddings else vocabulary, 2 * vocabulary, m),
    ]
