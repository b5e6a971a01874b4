"""Packed attention against a plain float64 softmax, document by document."""

from itertools import pairwise

import pytest
import torch

from qlatrain.models import Documents
from qlatrain.models.attention import packed_causal_attention


def reference(q, k, v, documents):
    """Softmax attention in float64 over each document of [1, N, H, D] tensors."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 2), v.double().repeat_interleave(group, 2)
    parts = []
    bounds = documents.cu_seqlens_cpu.tolist()
    for start, end in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[0, start:end], k[0, start:end]) * q.shape[-1] ** -0.5
        mask = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[0, start:end]))
    return torch.cat(parts)[None]


def check(lengths, heads, kv_heads, dim, device, dtype, bar):
    generator = torch.Generator().manual_seed(0)
    documents = Documents.of_lengths(lengths, device)
    tokens = sum(lengths)
    q, k, v, do = (
        torch.randn(1, tokens, h, dim, generator=generator).to(device, dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    results = []
    for function in (packed_causal_attention, reference):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        o = function(*leaves, documents)
        (o * do.to(o.dtype)).sum().backward()
        results.append([o, *(x.grad for x in leaves)])
    for ours, exact in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - exact.double()).norm() <= bar * exact.double().norm()


@pytest.mark.parametrize("lengths", [[7, 7, 7], [1, 5, 3, 5, 1], [12], [3, 0, 4]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
def test_by_document_on_cpu(lengths, heads, kv_heads):
    check(lengths, heads, kv_heads, 16, "cpu", torch.float32, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[64, 64], [1, 500, 3, 129, 1]])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 256)])
def test_varlen_on_gpu(lengths, heads, kv_heads, dim):
    check(lengths, heads, kv_heads, dim, "cuda", torch.bfloat16, 8e-3)
