"""The gated delta rule as the benchmark sees it: inputs, call, reference, bars, and the least work.

Legend: B batch, T tokens, Hk key heads, Hv value heads, r = Hv / Hk, K and V head sizes, C tokens of a chunk.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from qlakernels import chunk_gated_delta_rule
from qlakernels.gated_delta_rule import recurrent_gated_delta_rule_reference
from qlatrain.bench.fla_dispatch import FlaDispatch
from qlatrain.bench.floors import Work
from qlatrain.bench.shapes import Shape
from qlatrain.metrics.flops import CHUNK, GDN_BACKWARD

# ‖x − reference‖ / ‖reference‖ that a sound kernel with bfloat16 or float16 inputs stays under, and with float32
HALF_BARS = {"o": 4e-3, "dq": 6e-3, "dk": 6e-3, "dv": 6e-3, "dg": 8e-3, "dbeta": 8e-3}
FLOAT32_BAR = 1e-4
PEERS = ("flash_qla", "fla")
PEER_SLACK = 2.0  # on the bars: they round at other places, and are not ours to mend
RECURRENCE_ELEMENTS = 2**24  # states over all tokens, up to which the recurrence in float64 is run
KEY_SIDE = ("dq", "dk")


class GatedDeltaRule:
    """Inputs as a layer at initialisation sees them; gates ready-made in float32, q and k normalised by the operator.

    q, k and v are normal; the step size is sigmoid(normal); the log decay is −A · softplus(normal + b) with A from
    U(0.01, 16) for each head and b such that softplus(b) lies between 0.001 and 0.1.
    """

    short = "gdn"

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype = shape, dtype
        random = torch.Generator(device).manual_seed(seed)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=random, device=device)

        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.rand(shape.value_heads, generator=random, device=device) * (high - low) + low

        rows = (shape.batch, shape.tokens)
        q, k = (normal(*rows, shape.key_heads, shape.key_dim).to(dtype) for _ in range(2))
        v, self.cotangent = (normal(*rows, shape.value_heads, shape.value_dim).to(dtype) for _ in range(2))
        dt = uniform(math.log(0.001), math.log(0.1)).exp()
        dt_bias = dt + torch.log(-torch.expm1(-dt))
        g = -uniform(0.01, 16.0) * F.softplus(normal(*rows, shape.value_heads) + dt_bias)
        beta = normal(*rows, shape.value_heads).sigmoid()
        self.leaves = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        bounds = shape.bounds(seed)
        self._cu_seqlens_cpu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        self._cu_seqlens = None if bounds is None else self._cu_seqlens_cpu.to(device)
        # of their own type: they keep what they make of the same tensor from call to call
        self._cu_seqlens_of_peers = None if bounds is None else self._cu_seqlens.long()
        self._checked_key_heads = list(range(shape.key_heads))
        self._fla_dispatch = FlaDispatch.switched_off()

    def call(self, backend: str) -> torch.Tensor:
        """o [B, T, Hv, V]."""
        o, _ = self._chunked(backend, **self.leaves)
        if backend == "fla":
            self._fla_dispatch.check()
        return o

    def _chunked(self, backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return chunk_gated_delta_rule(
            **tensors,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=self._cu_seqlens_of_peers if backend in PEERS else self._cu_seqlens,
            cu_seqlens_cpu=self._cu_seqlens_cpu,
            backend=backend,
        )

    def reference(self, most_key_heads: int) -> tuple[dict[str, torch.Tensor], str]:
        """Small shapes: token by token in float64, whole. Large ones: chunked in float32, one key head with its value
        heads at a time, on `most_key_heads` of them (0 for all), the first and the last among them."""
        shape = self.shape
        states = shape.all_tokens * shape.value_heads * shape.key_dim * shape.value_dim
        if states <= RECURRENCE_ELEMENTS:
            self._checked_key_heads = list(range(shape.key_heads))
            with _one_thread():
                tensors = self._with_gradients(self._recurrence, self.leaves, self.cotangent, torch.float64)
            return tensors, "token by token in float64"
        count = min(most_key_heads or shape.key_heads, shape.key_heads)
        self._checked_key_heads = [round(i * (shape.key_heads - 1) / max(count - 1, 1)) for i in range(count)]
        parts = []
        for head in self._checked_key_heads:
            leaves = {name: self._of_key_heads(f"d{name}", leaf, [head]) for name, leaf in self.leaves.items()}
            cotangent = self._of_key_heads("o", self.cotangent, [head])
            parts.append(self._with_gradients(self._chunked_torch, leaves, cotangent, torch.float32))
        heads = "all key heads" if count == shape.key_heads else f"{count} of {shape.key_heads} key heads"
        return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}, (
            f"chunked in float32, {heads}"
        )

    def _recurrence(self, **tensors: torch.Tensor) -> torch.Tensor:
        return recurrent_gated_delta_rule_reference(
            **tensors, use_qk_l2norm_in_kernel=True, cu_seqlens=self._cu_seqlens_cpu
        )[0]

    def _chunked_torch(self, **tensors: torch.Tensor) -> torch.Tensor:
        return self._chunked("torch", **tensors)[0]

    @staticmethod
    def _with_gradients(function, leaves, cotangent, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        o = function(**leaves)
        gradients = torch.autograd.grad(o, list(leaves.values()), cotangent.to(dtype))
        return {"o": o.detach()} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}

    def covered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._of_key_heads(name, tensor, self._checked_key_heads)

    def _of_key_heads(self, name: str, tensor: torch.Tensor, key_heads: list[int]) -> torch.Tensor:
        """[B, T, H, …] → the heads that belong to these key heads. name: of an output or gradient."""
        if key_heads == list(range(self.shape.key_heads)):
            return tensor
        group = 1 if name in KEY_SIDE else self.shape.value_heads // self.shape.key_heads
        return torch.cat([tensor[:, :, head * group : (head + 1) * group] for head in key_heads], dim=2)

    def bars(self, backend: str) -> dict[str, float]:
        if self.dtype == torch.float32:
            return dict.fromkeys(HALF_BARS, FLOAT32_BAR)
        slack = PEER_SLACK if backend in PEERS else 1.0
        return {name: slack * bar for name, bar in HALF_BARS.items()}

    def note(self, backend: str) -> str:
        return self._fla_dispatch.note() if backend == "fla" else ""

    @staticmethod
    def work(shape: Shape, direction: str, element_bytes: int) -> Work:
        """The chunk algebra with C = 64, C×C products counted whole, and every tensor through memory once.

        FLOPs per token and value head: forward 4·C·K / r (K Kᵀ and Q Kᵀ, once for a group) + 6·K·V + 4·C·V; backward
        2.5 times that with r = 1, and 4·K·V + 2·C·V to have the states again, which is cheaper than to store them.
        Bytes, elements of e bytes: forward q, k, v, o: e (2V + 2K / r); backward q, k, v, do, dq, dk, dv: e (3V +
        4K / r); gates and their gradients in float32: 8 and 16.
        """
        key, value = shape.key_dim, shape.value_dim
        own, shared = 6 * key * value + 4 * CHUNK * value, 4 * CHUNK * key
        heads = shape.all_tokens * shape.value_heads
        forward = Work(
            flops=heads * (own + shared / shape.group),
            bytes=heads * (element_bytes * (2 * value + 2 * key / shape.group) + 8),
        )
        backward = Work(
            flops=heads * (GDN_BACKWARD * (own + shared) + 4 * key * value + 2 * CHUNK * value),
            bytes=heads * (element_bytes * (3 * value + 4 * key / shape.group) + 16),
        )
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: on a CPU that others use too, waiting for threads made them 30 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
