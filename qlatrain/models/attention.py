"""Causal attention inside packed documents, by torch's own fused kernels.

On a GPU in half precision: cuDNN where all documents are equally long, else `torch.nn.attention.varlen`. Elsewhere
`scaled_dot_product_attention`, once for each group of documents of equal length, so that full rows go through in one
call. Which one runs is logged once.
"""

import inspect
import logging
from collections import defaultdict
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

logger = logging.getLogger(__name__)

PATHS = {
    "rows": "scaled_dot_product_attention, cuDNN first, for documents of one length",
    "varlen": "varlen_attn",
    "documents": "scaled_dot_product_attention by document",
}
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

# torch 2.11 to 2.13 differ in how the causal mask is asked for and in whether grouped queries are taken as they are.
_VARLEN = inspect.signature(varlen_attn).parameters
_VARLEN_CAUSAL = {"window_size": (-1, 0)} if "window_size" in _VARLEN else {"is_causal": True}


def path_of(on_gpu: bool, dtype: torch.dtype, rows: int | None) -> str:
    """What computes it: `rows`, `varlen` or `documents`. rows: how many, where all documents are equally long."""
    if not on_gpu or dtype not in (torch.float16, torch.bfloat16):
        return "documents"
    return "varlen" if rows is None else "rows"


@cache
def say(path: str, device: str, dtype: torch.dtype) -> None:
    """Logs what runs, once; not for the inside of a trace."""
    logger.info(f"attention: torch {PATHS[path]} ({device}, {dtype})")


def packed_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents) -> torch.Tensor:
    """q [1, N, H, D], k and v [1, N, Hkv, D], `documents` with cu_seqlens, max_seqlen and rows; returns [1, N, H, D].

    Query head h attends with key/value head h // (H / Hkv); the scale is 1/√D.
    """
    path = path_of(q.is_cuda, q.dtype, documents.rows)
    if not torch.compiler.is_compiling():
        say(path, q.device.type, q.dtype)
    if path == "rows":
        return _by_rows(q, k, v, documents.rows)
    return _varlen(q, k, v, documents) if path == "varlen" else _by_document(q, k, v, documents)


def _by_rows(q, k, v, rows):
    """Documents of one length, taken as a batch."""
    q, k, v = (x.view(rows, -1, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(BACKENDS, set_priority=True):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).reshape(1, -1, o.shape[1], o.shape[3])


def _varlen(q, k, v, documents):
    gqa = {}
    group = q.shape[2] // k.shape[2]
    if group > 1 and "enable_gqa" in _VARLEN:
        gqa = {"enable_gqa": True}
    elif group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    return varlen_attn(q[0], k[0], v[0], cu, cu, longest, longest, **_VARLEN_CAUSAL, **gqa)[None]


@torch.compiler.disable
def _by_document(q, k, v, documents):
    starts = defaultdict(list)
    for start, end in pairwise(documents.cu_seqlens_cpu.tolist()):
        if end > start:
            starts[end - start].append(start)
    gqa = q.shape[2] != k.shape[2]
    if len(starts) == 1:  # nothing to gather: documents of one length lie behind each other
        (length,) = starts
        q, k, v = (x.view(-1, length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return o.transpose(1, 2).flatten(0, 1)[None]
    outputs, places = [], []
    for length, firsts in starts.items():
        index = (torch.tensor(firsts)[:, None] + torch.arange(length)).flatten().to(q.device)
        parts = (x[0].index_select(0, index).view(len(firsts), length, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=gqa)
        outputs.append(o.transpose(1, 2).flatten(0, 1))
        places.append(index)
    gathered = torch.cat(outputs)
    return torch.empty_like(gathered).index_copy(0, torch.cat(places), gathered)[None]
