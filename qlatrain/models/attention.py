"""Causal attention inside packed documents, by torch's own fused kernels.

On a GPU in half precision: `torch.nn.attention.varlen`. Elsewhere `scaled_dot_product_attention`, once for each group
of documents of equal length, so that full rows go through in one call. Which one runs is logged once.
"""

import inspect
import logging
from collections import defaultdict
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

logger = logging.getLogger(__name__)

# torch 2.11 to 2.13 differ in how the causal mask is asked for and in whether grouped queries are taken as they are.
_VARLEN = inspect.signature(varlen_attn).parameters
_VARLEN_CAUSAL = {"window_size": (-1, 0)} if "window_size" in _VARLEN else {"is_causal": True}


@cache
def _say_once(line: str) -> None:
    logger.info(line)


_say = torch.compiler.disable(_say_once)


def packed_causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents) -> torch.Tensor:
    """q [1, N, H, D], k and v [1, N, Hkv, D], `documents` with cu_seqlens and max_seqlen; returns [1, N, H, D].

    Query head h attends with key/value head h // (H / Hkv); the scale is 1/√D.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        _say("attention: torch varlen_attn (GPU, half precision)")
        return _varlen(q, k, v, documents)
    _say(f"attention: torch scaled_dot_product_attention by document ({q.device.type}, {q.dtype})")
    return _by_document(q, k, v, documents)


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
