"""The gated delta rule on Hopper as a differentiable torch operator.

Forward: P makes what a chunk needs, F scans. Backward: P again, E expands the kept states, R scans in reverse, G makes
the gradients. Kept in between, per token and value head: W and a state every 256 tokens; besides, the inputs.
Documents are told apart on the device alone: nothing here reads the values of `cu_seqlens`.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from qlakernels.gated_delta_rule.hopper.common import CHUNK, STATE_STRIDE
from qlakernels.gated_delta_rule.hopper.kernels import kernel, load, specialisations


@lru_cache(maxsize=64)
def dense_boundaries(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """cu_seqlens of a batch of equal rows, int32 [batch + 1]."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens


def run(
    *,
    q,
    k,
    v,
    g,
    beta,
    scale,
    initial_state,
    output_final_state,
    A_log,
    dt_bias,
    cu_seqlens,
    cu_seqlens_cpu,
    use_qk_l2norm_in_kernel,
    use_gate_in_kernel,
    use_beta_sigmoid_in_kernel,
    allow_neg_eigval,
):
    """As `chunk_gated_delta_rule`."""
    batch, tokens = q.shape[:2]
    if cu_seqlens is None:
        cu = dense_boundaries(batch, tokens, q.device)
    else:
        cu = cu_seqlens.to(q.device, torch.int32, non_blocking=True)
    if tokens == 0:
        return _of_no_tokens(k, v, cu, initial_state, output_final_state)
    inputs = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final_state, _, _ = _forward(
        *(tokens_first(x) for x in (q, k, v, g, beta)),
        cu,
        A_log,
        dt_bias,
        None if initial_state is None else initial_state.float().contiguous(),
        scale,
        output_final_state,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        keep,
    )
    return o.view(v.shape), (final_state if output_final_state else None)


def _of_no_tokens(k, v, cu, initial_state, output_final_state):
    """Every document is empty: states pass through."""
    if not output_final_state:
        return torch.zeros_like(v), None
    if initial_state is not None:
        return torch.zeros_like(v), initial_state.float().clone()
    return torch.zeros_like(v), v.new_zeros(cu.numel() - 1, v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] as [B·T, ...]: a view when the batch lies behind itself, as slices of one projection do."""
    return x.flatten(0, 1)


def tiles(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, H, D] as the copy engine takes it: rows of D, 16-byte steps. A view, unless a stride forbids it."""
    step = 16 // x.element_size()
    strides_fit = x.stride(2) == 1 and all(stride > 0 and stride % step == 0 for stride in x.stride()[:2])
    return x if strides_fit and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads] with heads behind each other: a view, unless they are not."""
    return x if x.stride(1) == 1 else x.contiguous()


def _sizes(tokens: int, documents: int) -> tuple[int, int, int]:
    """(slots, kept states, halvings that find a document)"""
    return tokens // CHUNK + documents, tokens // STATE_STRIDE + documents, max(1, math.ceil(math.log2(documents)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _specialisations(q, k, value_dim, g, beta, documents, l2norm, gate, sigmoid, keep) -> dict[str, tuple]:
    dtypes = _name(g.dtype), _name(beta.dtype)
    # a block of 128 rows of V serves more of them with one N and P; one of 64 has the shorter chain
    blocks = documents * g.shape[1] * -(-value_dim // 128)
    few = 2 * blocks <= torch.cuda.get_device_properties(q.device).multi_processor_count
    part = 64 if few or value_dim <= 64 else 128
    needed = specialisations(k.shape[2], value_dim, _name(q.dtype), l2norm, gate, sigmoid, *dtypes, keep, part)
    load(list(needed.values()))
    return needed


def _prepare(key, q, k, g, beta, cu, A_log, dt_bias, scale, neg):
    (tokens, groups), heads = k.shape[:2], g.shape[1]
    slots, _, steps = _sizes(tokens, cu.numel() - 1)
    N, P = (q.new_empty(slots, heads, CHUNK, CHUNK) for _ in range(2))
    gates = torch.empty(slots, heads, 2, CHUNK, device=q.device)
    norms = torch.empty(slots, groups, 2, CHUNK, device=q.device)
    A_log, dt_bias = (gates.new_zeros(heads) if x is None else x.float().contiguous() for x in (A_log, dt_bias))
    kernel(key)(
        q,
        k,
        rows(g),
        rows(beta),
        A_log,
        dt_bias,
        cu,
        N,
        P,
        gates,
        norms,
        scale,
        2.0 if neg else 1.0,
        steps,
        heads // groups,
    )
    return N, P, gates, norms


@torch.library.custom_op("qlakernels::gated_delta_rule", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    scale: float,
    output_final_state: bool,
    l2norm: bool,
    gate: bool,
    sigmoid: bool,
    neg: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensors [tokens, H, D]; returns o, final states, and for the backward W and every fourth chunk's state."""
    q, k, v = tiles(q), tiles(k), tiles(v)
    o, final_state, W, states = _forward_empty(q, k, v, cu_seqlens, output_final_state, keep)
    (tokens, groups, key_dim), (heads, value_dim) = k.shape, v.shape[1:]
    if initial_state is None:
        initial_state = final_state.new_empty(0, heads, key_dim, value_dim)
    keys = _specialisations(q, k, value_dim, g, beta, cu_seqlens.numel() - 1, l2norm, gate, sigmoid, keep)
    kernel(keys["boundaries"])(cu_seqlens, tokens)
    A_log, dt_bias = (final_state.new_zeros(heads) if x is None else x.float().contiguous() for x in (A_log, dt_bias))
    kernel(keys["forward"])(
        q,
        k,
        v,
        rows(g),
        rows(beta),
        A_log,
        dt_bias,
        cu_seqlens,
        initial_state,
        o,
        W,
        states,
        final_state,
        scale,
        2.0 if neg else 1.0,
        heads // groups,
    )
    return o, final_state, W, states


def _forward_empty(q, k, v, cu_seqlens, output_final_state, keep):
    (tokens, heads, value_dim), key_dim = v.shape, k.shape[2]
    documents = cu_seqlens.numel() - 1
    _, kept, _ = _sizes(tokens, documents)
    return (
        q.new_empty(tokens, heads, value_dim),
        q.new_empty(documents if output_final_state else 0, heads, key_dim, value_dim, dtype=torch.float32),
        q.new_empty(tokens if keep else 0, heads, value_dim),
        q.new_empty(kept if keep else 0, heads, value_dim, key_dim),
    )


@_forward.register_fake
def _(
    q,
    k,
    v,
    g,
    beta,
    cu_seqlens,
    A_log,
    dt_bias,
    initial_state,
    scale,
    output_final_state,
    l2norm,
    gate,
    sigmoid,
    neg,
    keep,
):
    return _forward_empty(q, k, v, cu_seqlens, output_final_state, keep)


@torch.library.custom_op("qlakernels::gated_delta_rule_backward", mutates_args=())
def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    W: torch.Tensor,
    states: torch.Tensor,
    do: torch.Tensor,
    d_final_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    with_initial_state: bool,
    scale: float,
    l2norm: bool,
    gate: bool,
    sigmoid: bool,
    neg: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """Returns dq, dk, dv, dg, dbeta (of the raw inputs), dA_log, ddt_bias, d_initial_state."""
    q, k, do = tiles(q), tiles(k), tiles(do)
    (tokens, groups, key_dim), (heads, value_dim) = k.shape, W.shape[1:]
    documents = cu_seqlens.numel() - 1
    slots, _, steps = _sizes(tokens, documents)
    ratio = heads // groups
    keys = _specialisations(q, k, value_dim, g, beta, documents, l2norm, gate, sigmoid, True)
    N, P, gates, norms = _prepare(keys["prepare"], q, k, g, beta, cu_seqlens, A_log, dt_bias, scale, neg)
    every, d_states = (q.new_empty(slots, heads, value_dim, key_dim) for _ in range(2))
    kernel(keys["expand"])(k, W, gates, norms, cu_seqlens, states, every, steps, ratio)
    dv = torch.empty_like(W)
    d_initial_state = gates.new_empty(documents if with_initial_state else 0, heads, key_dim, value_dim)
    if d_final_state is None:
        d_final_state = gates.new_empty(0, heads, key_dim, value_dim)
    kernel(keys["reverse"])(
        q,
        k,
        do,
        N,
        P,
        gates,
        norms,
        cu_seqlens,
        d_final_state.contiguous(),
        dv,
        d_states,
        d_initial_state,
        scale,
        ratio,
    )
    dq, dk = (torch.empty(tokens, groups, key_dim, dtype=q.dtype, device=q.device) for _ in range(2))
    dg, dbeta = (gates.new_empty(tokens, heads) for _ in range(2))
    workers = torch.cuda.get_device_properties(q.device).multi_processor_count
    kernel(keys["gradients"])(
        q, k, do, W, dv, every, d_states, gates, norms, cu_seqlens, dq, dk, dg, dbeta, scale, steps, ratio, workers
    )
    dA_log, ddt_bias = gates.new_empty(0), gates.new_empty(0)
    if gate:
        before = g.float() if dt_bias is None else g.float() + dt_bias.float()
        rate = -A_log.float().exp()
        dA_log = (dg * rate * F.softplus(before)).sum(0)
        dg = dg * rate * before.sigmoid()
        ddt_bias = dg.sum(0)
    if sigmoid:
        part_of_one = beta.float().sigmoid()
        dbeta = dbeta * part_of_one * (1 - part_of_one) * (2.0 if neg else 1.0)
    return dq, dk, dv, dg.to(g.dtype), dbeta.to(beta.dtype), dA_log, ddt_bias, d_initial_state


@_backward.register_fake
def _(
    q,
    k,
    g,
    beta,
    W,
    states,
    do,
    d_final_state,
    cu_seqlens,
    A_log,
    dt_bias,
    with_initial_state,
    scale,
    l2norm,
    gate,
    sigmoid,
    neg,
):
    heads, value_dim = W.shape[1:]
    documents = cu_seqlens.numel() - 1
    per_head = q.new_empty(heads if gate else 0, dtype=torch.float32)
    return (
        q.new_empty(q.shape),
        q.new_empty(k.shape),
        torch.empty_like(W),
        g.new_empty(g.shape),
        beta.new_empty(beta.shape),
        per_head,
        torch.empty_like(per_head),
        q.new_empty(documents if with_initial_state else 0, heads, k.shape[2], value_dim, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    q, k, _, g, beta, cu_seqlens, A_log, dt_bias, initial_state, scale, output_final_state, *options, _ = inputs
    _, _, W, states = output
    ctx.save_for_backward(q, k, g, beta, W, states, cu_seqlens, A_log, dt_bias)
    ctx.with_initial_state = initial_state is not None
    ctx.with_final_state = output_final_state
    ctx.scale, ctx.options = scale, options
    ctx.set_materialize_grads(False)


def _gradients(ctx, do, d_final_state, dW, d_kept):
    q, k, g, beta, W, states, cu_seqlens, A_log, dt_bias = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(W)
    dq, dk, dv, dg, dbeta, dA_log, ddt_bias, d_initial_state = _backward(
        q, k, g, beta, W, states, do, d_final_state if ctx.with_final_state else None, cu_seqlens, A_log, dt_bias,
        ctx.with_initial_state, ctx.scale, *ctx.options,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        dg,
        dbeta,
        None,
        dA_log.to(A_log.dtype) if A_log is not None else None,
        ddt_bias.to(dt_bias.dtype) if dt_bias is not None else None,
        d_initial_state if ctx.with_initial_state else None,
        *[None] * 7,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)
