"""The models that `bench_step` measures, each with the step that its users take.

Ours is taken with the parts that training uses. Peers have float32 weights under autocast, `torch.optim.AdamW` with
fused updates and clipping of the gradient, and run eagerly: their own fused parts are what they come with.
"""

import importlib
import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from qlakernels.ranges import named_range
from qlatrain.bench.step_config import PEERS
from qlatrain.bench.step_job import OURS, StepJob
from qlatrain.config import ModelConfig, ParallelConfig
from qlatrain.data.packing import IGNORE_INDEX, PackedBatch
from qlatrain.metrics.flops import FlopCounter
from qlatrain.models import HybridForCausalLM
from qlatrain.models.attention import packed_causal_attention
from qlatrain.models.hf_config import NEG_EIGVAL, to_hf_config
from qlatrain.parallel import Layout
from qlatrain.training.step import PendingResult, TrainStep

PACKAGES = {"fla": "flash-linear-attention", "transformers": "transformers"}


class Refused(Exception):
    """A peer cannot run this; the message says why."""


class OurModel:
    """The model, layout, optimizers and step of training."""

    def __init__(self, job: StepJob):
        self.note = ""
        layout = Layout(ParallelConfig("single"), job.train.mixed_precision)
        self.device, self.flops = layout.device, FlopCounter(job.model)
        self._model = HybridForCausalLM(job.model, job.kernel, seed=job.seed)
        self._step = TrainStep.of(self._model, layout, job.train, job.optim, self.flops.step_flops)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def step(self, batch: PackedBatch) -> PendingResult:
        return self._step([batch], 1.0, False)

    @staticmethod
    def loss(result: PendingResult) -> float:
        """The mean over the targets of a step; waits for the device."""
        return result.read().loss


class Peer:
    """What the peers have in common. `build` and `arguments` are a peer's own."""

    def __init__(self, job: StepJob):
        self.job, self.note = job, ""
        self.device = torch.device("cuda" if job.on_gpu else "cpu")
        if not job.on_gpu:
            torch.set_flush_denormal(True)  # as `Layout` does
        torch.manual_seed(job.seed)
        self.flops = FlopCounter(self.counted(job.model))
        self._model = self.build(job.model).to(self.device).train()
        if job.train.activation_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        optim = job.optim
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=optim.lr,
            betas=tuple(optim.betas),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def build(self, model: ModelConfig) -> nn.Module:
        raise NotImplementedError

    def arguments(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Of the model's forward, for packed documents."""
        raise NotImplementedError

    def counted(self, model: ModelConfig) -> ModelConfig:
        """The sizes that FLOPs are counted for."""
        return model

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def step(self, batch: PackedBatch) -> Tensor:
        batch, shape = batch.to(self.device), self.job.batch_shape
        rows = (shape.batch, shape.tokens)
        # they move labels by one themselves, so that the first token of a document is the one that is no target
        labels = batch.input_ids.masked_fill(batch.position_ids == 0, IGNORE_INDEX).view(rows)
        packed = self.arguments(batch) if shape.documents is not None else {}
        bf16 = self.job.train.mixed_precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            loss = self._model(input_ids=batch.input_ids.view(rows), labels=labels, use_cache=False, **packed).loss
        loss.backward()
        with named_range("optimizer"):
            nn.utils.clip_grad_norm_(self._model.parameters(), self.job.train.max_grad_norm)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @staticmethod
    def loss(result: Tensor) -> float:
        return result.item()


class TransformersModel(Peer):
    """transformers' Qwen3.5 or OLMo-Hybrid of the same sizes, attention by `sdpa`."""

    def build(self, model: ModelConfig) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        hf = to_hf_config(model)
        if hf["model_type"] == NEG_EIGVAL:
            raise Refused("transformers' Qwen3.5 has no negative eigenvalues (model.allow_neg_eigval=true)")
        has_fla = importlib.util.find_spec("fla") is not None and self.job.on_gpu
        if self.job.batch_shape.documents is not None and not has_fla:
            raise Refused("without flash-linear-attention on a GPU it does not keep packed documents apart")
        self.note = transformers_note(has_fla, packed=self.job.batch_shape.documents is not None)
        config = AutoConfig.for_model(hf.pop("model_type"), **hf)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)

    def arguments(self, batch: PackedBatch) -> dict:
        return transformers_arguments(batch)


def transformers_arguments(batch: PackedBatch) -> dict:
    """The boundaries of packed documents, as transformers' models take them."""
    longest = batch.max_seqlen
    return {
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def transformers_note(has_fla: bool, packed: bool) -> str:
    """What runs in transformers' GDN layers, and what of it does not keep packed documents apart."""
    has_conv = importlib.util.find_spec("causal_conv1d") is not None
    across = ["the rule"] * (not has_fla) + ["the convolution"] * (not has_conv)
    note = f"gated delta rule {'by fla where transformers takes it' if has_fla else 'in plain PyTorch'}, convolution "
    note += "by causal-conv1d" if has_conv else "in plain PyTorch"
    if packed and across:
        note += f"; across the boundaries of packed documents: {' and '.join(across)}"
    return note


class FlaModel(Peer):
    """FLA's Gated DeltaNet model of the nearest sizes: its attention layers have no output gate, and heads that fill
    the width."""

    def counted(self, model: ModelConfig) -> ModelConfig:
        if "attn" not in model.layer_kinds:
            return model
        if model.hidden_size % model.num_attention_heads:
            raise Refused(
                f"its attention heads fill the width, and {model.num_attention_heads} do not divide {model.hidden_size}"
            )
        head_dim = model.hidden_size // model.num_attention_heads
        return replace(model, architecture="olmo_hybrid", head_dim=head_dim, partial_rotary_factor=1.0)

    def build(self, model: ModelConfig) -> nn.Module:
        if not self.job.on_gpu:
            raise Refused("its kernels need a GPU")
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

        attention = [i for i, kind in enumerate(model.layer_kinds) if kind == "attn"]
        notes = ["nearest sizes"]
        if attention:
            notes.append(f"attention heads of {model.hidden_size // model.num_attention_heads} without an output gate")
            if importlib.util.find_spec("flash_attn") is None:
                attend_with_torch()
                notes.append("torch's own flash attention, as flash-attn is not installed")
        self.note = ", ".join(notes)
        return GatedDeltaNetForCausalLM(
            GatedDeltaNetConfig(
                hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size,
                num_hidden_layers=model.num_hidden_layers,
                vocab_size=model.vocab_size,
                head_dim=model.linear_key_head_dim,
                expand_v=model.linear_value_head_dim / model.linear_key_head_dim,
                num_heads=model.linear_num_key_heads,
                num_v_heads=model.linear_num_value_heads,
                conv_size=model.linear_conv_kernel_dim,
                allow_neg_eigval=model.allow_neg_eigval,
                norm_eps=model.rms_norm_eps,
                initializer_range=model.initializer_range,
                tie_word_embeddings=model.tie_word_embeddings,
                max_position_embeddings=max(model.max_position_embeddings, self.job.batch_shape.tokens),
                use_cache=False,
                attn={
                    "layers": attention,
                    "num_heads": model.num_attention_heads,
                    "num_kv_heads": model.num_key_value_heads,
                    "qkv_bias": model.attention_bias,
                    "rope_theta": model.rope_theta or 10_000.0,
                }
                if attention
                else None,
            )
        ).float()

    def arguments(self, batch: PackedBatch) -> dict:
        return {"cu_seqlens": batch.cu_seqlens}


MODELS = {OURS: OurModel, "transformers": TransformersModel, "fla": FlaModel}
assert MODELS.keys() == {OURS, *PEERS}


def missing(name: str) -> str | None:
    """Why a peer cannot even be tried: its package is not installed."""
    if name == OURS or importlib.util.find_spec(name) is not None:
        return None
    return f"{PACKAGES[name]} is not installed: pip install {PACKAGES[name]}"


def load_packages(job: StepJob) -> None:
    """Imports what building the model would: the time of it is not that of the first step."""
    if job.name == "transformers":
        family = job.model.architecture
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    elif job.name == "fla":
        importlib.import_module("fla.models")


def attend_with_torch() -> None:
    """Puts torch's fused attention where FLA's layers look for flash-attn's, in this process."""
    module = importlib.import_module("fla.layers.attn")

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
        assert causal and window_size == (-1, -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return o.transpose(1, 2)

    def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, **rest) -> Tensor:
        assert rest["causal"] and rest["window_size"] == (-1, -1)
        documents = SimpleNamespace(
            cu_seqlens=cu_seqlens_q,
            cu_seqlens_cpu=cu_seqlens_q,  # read where the tensors are on the CPU
            max_seqlen=max_seqlen_q,
            rows=None,
        )
        return packed_causal_attention(q[None], k[None], v[None], documents)[0]

    module.flash_attn_func, module.flash_attn_varlen_func = dense, packed
