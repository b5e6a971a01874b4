"""The gated delta rule on Hopper as a differentiable torch operator.

Forward: F scans. Backward: R scans in reverse, G carries the kept states on and makes the gradients, and a small kernel
takes them to the raw gates. Kept in between, per token and value head: W and a state every 256 tokens; besides, the
inputs.
Documents are told apart on the device alone: nothing here reads the values of `cu_seqlens`.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch

from qlakernels.compiled import launchers
from qlakernels.gated_delta_rule.hopper.constants import constant, equal_rows, zero_states, zeros
from qlakernels.gated_delta_rule.hopper.kernels import rows_of_many_scans, specialisations
from qlakernels.gated_delta_rule.hopper.sizes import (
    CHUNK,
    GATE_TOKENS,
    PIECE,
    STATE_STRIDE,
    VECTORS,
    padded_values,
)
from qlakernels.operators import below_autograd, define, differentiate, differentiate_no_further, name_of

LEAST_SEGMENT = 1024  # tokens; with shorter ones, or fewer to a document, the stitching costs more than it gains
LEAST_CUTS = 3
LEAST_SECTION = 2048  # a section more to stitch takes as long as 50 tokens of one to scan
MOST_DOCUMENTS = 2**16 - 1  # blocks of a grid along its third side


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
    """As `chunk_gated_delta_rule`. Raises ValueError for more documents than a launch takes."""
    batch, tokens = q.shape[:2]
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q.device, torch.int32, non_blocking=True)
    documents = _documents(q, cu_seqlens)
    if documents > MOST_DOCUMENTS:
        name = "q has a batch" if cu_seqlens is None else "cu_seqlens holds a number of documents"
        raise ValueError(f"{name} of {documents}; backend tilelang takes {MOST_DOCUMENTS} in a call: split it")
    if batch * tokens == 0:
        return _of_no_tokens(k, v, documents, initial_state, output_final_state)
    inputs = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final_state, *_ = _forward_op(
        q,
        k,
        v,
        g,
        beta,
        cu_seqlens,
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
    return o, (final_state if output_final_state else None)


def _of_no_tokens(k, v, documents, initial_state, output_final_state):
    """Every document is empty: states pass through."""
    if not output_final_state:
        return torch.zeros_like(v), None
    if initial_state is not None:
        return torch.zeros_like(v), initial_state.float().clone()
    return torch.zeros_like(v), v.new_zeros(documents, v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] as [B·T, ...]: a view when the batch lies behind itself, as slices of one projection do."""
    return x.flatten(0, 1)


def tiles(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D] as the copy engine takes it, [B·T, H, D]: rows of D, 16-byte steps. A view, unless a stride
    forbids it."""
    x = tokens_first(x)
    step = 16 // x.element_size()
    token, head, last = x.stride()
    fits = last == 1 and token > 0 and head > 0 and token % step == 0 and head % step == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H] as [B·T, H] with heads behind each other: a view, unless they are not."""
    x = tokens_first(x)
    return x if x.stride(1) == 1 else x.contiguous()


def _sizes(tokens: int, documents: int) -> tuple[int, int]:
    """(slots of chunks, states kept: one every STATE_STRIDE tokens of a document but the first, one at least)"""
    return tokens // CHUNK + documents, torch.sym_max(tokens // STATE_STRIDE, 1)


def _steps(documents: int) -> int:
    """Halvings that find a document. Not for traces: the logarithm would tie them to one number of documents."""
    return max(1, math.ceil(math.log2(documents)))


@cache
def _launchers(
    key_dim, value_dim, dtype, l2norm, gate, sigmoid, raw_dtype, beta_dtype, keep, part, cut
) -> dict[str, Callable]:
    """The kernels of a call, and with `keep` of its backward, by name; compiled side by side where they are not yet."""
    dtypes = name_of(raw_dtype), name_of(beta_dtype)
    needed = specialisations(key_dim, value_dim, name_of(dtype), l2norm, gate, sigmoid, *dtypes, keep, part, cut)
    return launchers(needed)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Plan(NamedTuple):
    """How the scans are shared out.

    part: rows of V for a block. turns: documents or segments, a block to each `part` and head. segment: tokens of a
    segment, 0 where documents are not cut; section: tokens of the equal parts that it is stitched in.
    """

    part: int
    turns: int
    segment: int = 0
    section: int = 0

    @property
    def cut(self) -> bool:
        return self.segment > 0


def _plan(q: torch.Tensor, cu_seqlens: torch.Tensor | None, heads: int, value_dim: int) -> Plan:
    """q [B, T, Hk, K], `heads` of values.

    Blocks of 128 rows share one N and P and the tiles of q and k. Where there is room for several times as many,
    documents are cut into segments that fill the chip once; short ones are taken by blocks of 64. How long packed
    documents are is not known here; with few of them one may be nearly all.
    """
    documents, (rows, longest) = _documents(q, cu_seqlens), q.shape[:2]
    chip, part = _multiprocessors(q.device), rows_of_many_scans(value_dim)
    blocks = heads * -(-value_dim // 128)
    segment = longest
    if cu_seqlens is not None and documents * blocks < 2 * chip:
        segment = -(-longest * blocks // chip)
    elif documents * blocks * LEAST_CUTS <= chip:
        segment = -(-longest // (chip // (documents * blocks)))
    segment = max(segment, LEAST_SEGMENT)
    sections = -(-segment // max(LEAST_SECTION, math.isqrt(64 * longest)))
    section = -(-segment // (sections * STATE_STRIDE)) * STATE_STRIDE
    segment = sections * section
    if segment >= longest:
        return Plan(64 if documents * blocks * 2 <= chip else part, documents)
    return Plan(part, rows * longest // segment + documents, segment, section)


def _documents(q, cu_seqlens) -> int:
    """How many, with q [B, T, Hk, K]"""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _boundaries(launch, q, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor]:
    """(cu_seqlens, the order for the scans to take the documents in); those that were given are checked."""
    batch, tokens = q.shape[:2]
    if cu_seqlens is None:
        return constant(equal_rows, batch, tokens, device=q.device)
    order = cu_seqlens.new_empty(cu_seqlens.numel() - 1)
    launch["boundaries"](cu_seqlens, order, tokens)
    return cu_seqlens, order


@contextmanager
def _heard(cu_seqlens, tokens):
    """Adds to an error what the device may have against boundaries.

    The requirement that does not hold is printed by the driver, at the wait at the latest.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if cu_seqlens is None or not cu_seqlens.is_cuda:
            raise
        with suppress(RuntimeError):
            torch.cuda.synchronize(cu_seqlens.device)
        why = f"cu_seqlens does not start at 0, descends or does not end at {tokens}, the number of tokens"
        raise RuntimeError(f"{error}\nIf {why}, this is why: the device checks it, and stops.") from error


def _enter_segments(launch, plan, reverse, q, k, x, g, beta, A_log, dt_bias, cu, first_state, options, steps):
    """What enters each segment, at its first section (in reverse, its last), [cuts, Hv, V, K] in float32; x: v, or dO.
    Empty where nothing is cut.

    first_state [documents or 0, Hv, K, V]: what enters the documents.
    """
    groups, key_dim = k.shape[1:]
    heads, value_dim = x.shape[1:]
    float32 = {"dtype": torch.float32}
    documents = cu.numel() - 1
    cuts = q.shape[0] // plan.section + documents if plan.cut else 0
    states = q.new_empty(cuts, heads, value_dim, key_dim, **float32)
    if not plan.cut:
        return states
    slots, _ = _sizes(q.shape[0], documents)
    bounds = q.new_empty(slots, heads, **float32)
    reaches = cu.new_empty(cuts, heads)
    N, P = (q.new_empty(n, heads, CHUNK, CHUNK) for n in (slots, slots if reverse else 0))
    vectors = q.new_empty(slots, heads, VECTORS, CHUNK, **float32)
    maps = q.new_empty(cuts, heads, 2, key_dim, key_dim, dtype=torch.bfloat16)
    suffix = "_reverse" if reverse else ""
    if "decay" in launch:
        launch["decay"](g, beta, A_log, dt_bias, cu, bounds, options[1], steps)
    lengths = plan.segment, plan.section
    launch["reach"](cu, bounds, reaches, *lengths, steps, int(first_state.shape[0] > 0), int(reverse))
    launch["prepare" + suffix](
        q, k, g, beta, A_log, dt_bias, cu, reaches, N, P, vectors, *options, heads // groups, plan.section, steps
    )
    launch["segments" + suffix](q, k, x, cu, reaches, N, P, vectors, states, maps, heads // groups, plan.section, steps)
    launch["stitch" + suffix](cu, first_state, reaches, maps, states, *lengths)
    return states


def _gates_and_norms(q, slots, heads, groups):
    return tuple(q.new_empty(slots, n, 2, CHUNK, dtype=torch.float32) for n in (heads, groups))


def _gate_parameters(A_log, dt_bias, heads, device):
    """Both as float32 [heads]; zeros for one that is not there, which the gate reads as no bias, and nobody else."""
    return tuple(
        constant(zeros, heads, device=device)[0] if x is None else x.float().contiguous() for x in (A_log, dt_bias)
    )


def _forward(
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
    """Tensors [B, T, H, D]; returns o and final states, and for the backward W [B·T, H, V], every fourth chunk's state
    but the first, the rounded initial states, and the order of the documents where they were given."""
    (groups, key_dim), (heads, value_dim) = k.shape[2:], v.shape[2:]
    o, final_state, W, states, first_states = _outputs(q, k, v, cu_seqlens, initial_state, output_final_state, keep)
    if keep and v.shape[0] * v.shape[1] < STATE_STRIDE:
        states.zero_()  # its one place is nobody's
    if initial_state is None:
        initial_state = final_state.new_empty(0, heads, key_dim, value_dim)
    documents = _documents(q, cu_seqlens)
    plan = _plan(q, cu_seqlens, heads, value_dim)
    launch = _launchers(
        key_dim, value_dim, q.dtype, l2norm, gate, sigmoid, g.dtype, beta.dtype, keep, plan.part, plan.cut
    )
    A_log, dt_bias = _gate_parameters(A_log, dt_bias, heads, q.device)
    with _heard(cu_seqlens, v.shape[0] * v.shape[1]):
        cu, order = _boundaries(launch, q, cu_seqlens)
        q, k, v, g, beta = tiles(q), tiles(k), tiles(v), rows(g), rows(beta)
        options, steps = (scale, 2.0 if neg else 1.0), _steps(documents)
        raw = g, beta, A_log, dt_bias, cu
        section_states = _enter_segments(launch, plan, False, q, k, v, *raw, initial_state, options, steps)
        launch["forward"](
            q,
            k,
            v,
            g,
            beta,
            A_log,
            dt_bias,
            cu,
            order,
            initial_state,
            tokens_first(o),
            W,
            states,
            first_states if first_states.numel() else states,  # something that the copy engine takes
            final_state,
            section_states,
            *options,
            heads // groups,
            plan.turns,
            plan.segment,
            plan.section,
            steps,
        )
    return o, final_state, W, states, first_states, (cu.new_empty(0) if cu_seqlens is None else order)


def _outputs(q, k, v, cu_seqlens, initial_state, output_final_state, keep):
    """o, final states, W, kept states, first states"""
    (batch, tokens, heads, value_dim), key_dim = v.shape, k.shape[3]
    documents = _documents(q, cu_seqlens)
    _, kept = _sizes(batch * tokens, documents)
    return (
        q.new_empty(v.shape),
        q.new_empty(documents if output_final_state else 0, heads, key_dim, value_dim, dtype=torch.float32),
        q.new_empty(batch * tokens if keep else 0, heads, value_dim),
        q.new_empty(kept if keep else 0, heads, value_dim, key_dim),
        q.new_zeros(documents if keep and initial_state is not None else 0, heads, value_dim, key_dim),
    )


def _forward_fake(
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
    order = q.new_empty(0 if cu_seqlens is None else _documents(q, cu_seqlens), dtype=torch.int32)
    return *_outputs(q, k, v, cu_seqlens, initial_state, output_final_state, keep), order


def _backward(
    q,
    k,
    g,
    beta,
    W,
    states,
    first_states,
    do,
    d_final_state,
    cu_seqlens,
    order,
    A_log,
    dt_bias,
    with_initial_state,
    scale,
    l2norm,
    gate,
    sigmoid,
    neg,
    v_strides,
    into=None,
):
    """Returns dq, dk, dv, dg, dbeta (of the raw inputs), those of A_log and dt_bias as one [2, Hv], d_initial_state.

    into: what dq, dk, dv, dg and dbeta are written to, all [B, T, ...], slices of longer rows among them. Without it
    the first three are laid out as `laid_out_as` says.
    """
    documents = _documents(q, cu_seqlens)
    plan = _plan(q, cu_seqlens, *W.shape[1:])
    whole = into or (
        laid_out_as(q, q.shape, q.stride()),
        laid_out_as(q, k.shape, k.stride()),
        laid_out_as(q, do.shape, v_strides),
        torch.empty_like(g, memory_format=torch.contiguous_format),
        torch.empty_like(beta, memory_format=torch.contiguous_format),
    )
    dq, dk, dv, dg, dbeta = map(_in_place, whole)
    launch = _launchers(
        k.shape[3], W.shape[2], q.dtype, l2norm, gate, sigmoid, g.dtype, beta.dtype, True, plan.part, plan.cut,
    )  # fmt: skip
    if cu_seqlens is None:
        cu_seqlens, order = _boundaries(launch, q, None)
    q, k, do, g, beta = tiles(q), tiles(k), tiles(do), rows(g), rows(beta)
    (tokens, groups, key_dim), (heads, value_dim) = k.shape, W.shape[1:]
    slots, _ = _sizes(tokens, documents)
    ratio = heads // groups
    A_log, dt_bias = _gate_parameters(A_log, dt_bias, heads, q.device)
    gates, norms = _gates_and_norms(q, slots, heads, groups)
    options, steps = (scale, 2.0 if neg else 1.0), _steps(documents)
    d_states = q.new_empty(slots, heads, value_dim, key_dim)
    d_initial_state = gates.new_empty(documents if with_initial_state else 0, heads, key_dim, value_dim)
    if d_final_state is None:
        d_final_state = gates.new_empty(0, heads, key_dim, value_dim)
    d_final_state = d_final_state.contiguous()
    raw = g, beta, A_log, dt_bias, cu_seqlens
    written, steps_written = zip(*map(_in_pieces, (dv, dq, dk)), strict=True)
    section_states = _enter_segments(launch, plan, True, q, k, do, *raw, d_final_state, options, steps)
    launch["reverse"](
        q,
        k,
        do,
        g,
        beta,
        A_log,
        dt_bias,
        cu_seqlens,
        order,
        d_final_state,
        dv,
        written[0],
        d_states,
        d_initial_state,
        gates,
        norms,
        section_states,
        *steps_written[0],
        *options,
        ratio,
        plan.turns,
        plan.segment,
        plan.section,
        steps,
    )
    raw_gates = "gate_gradients" in launch
    # those that the kernel of the raw gates reads, or whoever wants them
    dg_inside, dbeta_inside = (
        x if x.dtype == torch.float32 and x.is_contiguous() and not raw_gates else gates.new_empty(tokens, heads)
        for x in (dg, dbeta)
    )
    with_first = first_states.numel() > 0
    workers = _multiprocessors(q.device)
    scratch = q.new_empty(workers, ratio, padded_values(value_dim), key_dim)
    launch["gradients"](
        q,
        k,
        do,
        W,
        dv,
        states,
        first_states
        if with_first
        else constant(zero_states, heads, value_dim, key_dim, device=q.device)[0].view(q.dtype),
        d_states,
        gates,
        norms,
        cu_seqlens,
        scratch,
        *written,
        dg_inside,
        dbeta_inside,
        *chain.from_iterable(steps_written),
        scale,
        steps,
        ratio,
        workers,
        int(with_first),
    )
    d_parameters = gates.new_empty(0, heads)
    if raw_gates:
        sums = gates.new_empty(2, -(-tokens // GATE_TOKENS), heads)
        launch["gate_gradients"](dg_inside, dbeta_inside, g, beta, A_log, dt_bias, dg, dbeta, sums, options[1])
        if gate:
            d_parameters = sums.sum(1)
    else:
        for x, inside in ((dg, dg_inside), (dbeta, dbeta_inside)):
            if x is not inside:
                x.copy_(inside)
    return *whole, d_parameters, d_initial_state


def laid_out_as(like: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Empty [B, T, H, D], contiguous, or with heads outside of tokens if a tensor of these strides is like that."""
    batch, tokens, heads, dim = shape
    heads_outside = tuple(strides[1:]) == (dim, batch * tokens * dim, 1) and (batch == 1 or strides[0] == tokens * dim)
    if heads > 1 and heads_outside:
        return like.new_empty(heads, batch, tokens, dim).permute(1, 2, 0, 3)
    return like.new_empty(shape)


def _in_pieces(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """x [N, H, D] from its first number to its last in pieces of 16 bytes, and the steps between tokens and heads."""
    (tokens, heads, dim), (token, head, _) = x.shape, x.stride()
    numbers = (tokens - 1) * token + (heads - 1) * head + dim
    return x.as_strided((numbers // PIECE, PIECE), (PIECE, 1)), (token // PIECE, head // PIECE)


def _in_place(x: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] as [B·T, ...], a view that kernels can write to."""
    return x.view(x.shape[0] * x.shape[1], *x.shape[2:])


def _backward_fake(
    q,
    k,
    g,
    beta,
    W,
    states,
    first_states,
    do,
    d_final_state,
    cu_seqlens,
    order,
    A_log,
    dt_bias,
    with_initial_state,
    scale,
    l2norm,
    gate,
    sigmoid,
    neg,
    v_strides,
):
    heads, value_dim = W.shape[1:]
    return (
        laid_out_as(q, q.shape, q.stride()),
        laid_out_as(q, k.shape, k.stride()),
        laid_out_as(q, do.shape, v_strides),
        g.new_empty(g.shape),
        beta.new_empty(beta.shape),
        q.new_empty(2 if gate else 0, heads, dtype=torch.float32),
        q.new_empty(
            _documents(q, cu_seqlens) if with_initial_state else 0, heads, k.shape[3], value_dim, dtype=torch.float32
        ),
    )


_forward_op = define(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? cu_seqlens, Tensor? A_log, "
    "Tensor? dt_bias, Tensor? initial_state, float scale, bool output_final_state, bool l2norm, "
    "bool gate, bool sigmoid, bool neg, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "gated_delta_rule_backward(Tensor q, Tensor k, Tensor g, Tensor beta, Tensor W, Tensor states, "
    "Tensor first_states, Tensor do, Tensor? d_final_state, Tensor? cu_seqlens, Tensor order, Tensor? A_log, "
    "Tensor? dt_bias, bool with_initial_state, float scale, bool l2norm, bool gate, bool sigmoid, bool neg, "
    "SymInt[] v_strides) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, *inputs):
        output = below_autograd(_forward_op, keyset, *inputs)
        q, k, v, g, beta, cu_seqlens, A_log, dt_bias, initial_state, scale, final, *options, _ = inputs
        _, _, W, states, first_states, order = output
        ctx.save_for_backward(q, k, g, beta, W, states, first_states, cu_seqlens, order, A_log, dt_bias)
        ctx.mark_non_differentiable(W, states, first_states, order)
        ctx.set_materialize_grads(False)
        ctx.with_initial_state, ctx.with_final_state = initial_state is not None, final
        ctx.scale, ctx.options, ctx.v_strides = scale, options, v.stride()
        return output

    @staticmethod
    def backward(ctx, do, d_final_state, *_):
        q, k, g, beta, W, states, first_states, cu_seqlens, order, A_log, dt_bias = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(W).unflatten(0, q.shape[:2])
        dq, dk, dv, dg, dbeta, d_parameters, d_initial_state = _backward_op(
            q, k, g, beta, W, states, first_states, do, d_final_state if ctx.with_final_state else None, cu_seqlens,
            order, A_log, dt_bias, ctx.with_initial_state, ctx.scale, *ctx.options, ctx.v_strides,
        )  # fmt: skip
        return (
            None,
            dq,
            dk,
            dv,
            dg,
            dbeta,
            None,
            d_parameters[0].to(A_log.dtype) if A_log is not None else None,
            d_parameters[1].to(dt_bias.dtype) if dt_bias is not None else None,
            d_initial_state if ctx.with_initial_state else None,
            *[None] * 7,
        )


def _autograd(keyset, *inputs):
    """The last input says whether gradients are wanted."""
    return _GatedDeltaRule.apply(keyset, *inputs) if inputs[-1] else below_autograd(_forward_op, keyset, *inputs)


differentiate(_forward_op, _autograd)
differentiate_no_further(_backward_op, "the gated delta rule")
