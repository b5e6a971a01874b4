"""`chunk_gated_delta_rule`: the one public function of the operator. Checks its arguments, then lets a backend run."""

import torch

from qlakernels.backends import Backend, Call, refused_by_hopper, register, select
from qlakernels.checks import check_cu_seqlens
from qlakernels.gated_delta_rule import peers
from qlakernels.gated_delta_rule.torch_chunk import chunk_gated_delta_rule_torch, dense_bounds
from qlakernels.ranges import named_range

OPERATOR = "gated_delta_rule"


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
    cu_seqlens_cpu: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule, S_t = γ_t S_{t-1} + k_t ⊗ β_t (v_t − (γ_t S_{t-1})ᵀ k_t), o_t = scale · S_tᵀ q_t.

    Source: Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule". The signature is that of
    flash-linear-attention's function of the same name.

    Args:
        q, k: [B, T, Hk, K]. Each key head serves Hv / Hk consecutive value heads.
        v: [B, T, Hv, V], of the dtype of q and k (float32, bfloat16, float16; float64 with the torch backend).
        g: [B, T, Hv], the logarithm of the decay, ≤ 0; the raw gate when `use_gate_in_kernel`.
        beta: [B, T, Hv], the step size in [0, 2]; its logit when `use_beta_sigmoid_in_kernel`.
        scale: factor on the output; 1/√K when None.
        initial_state: [N, Hv, K, V], one for each document (B of them in a dense batch); zero when None.
        output_final_state: also return the states after the last tokens.
        use_qk_l2norm_in_kernel: normalise q and k to unit length over K (1e-6 under the root).
        use_gate_in_kernel: the decay is g ← −exp(A_log) · softplus(g + dt_bias), in float32.
        A_log, dt_bias: [Hv], for `use_gate_in_kernel`; dt_bias may be None.
        use_beta_sigmoid_in_kernel: beta ← sigmoid(beta), doubled with `allow_neg_eigval`.
        allow_neg_eigval: with `use_beta_sigmoid_in_kernel`, step sizes reach up to 2 (Grazzi et al. 2024).
        cu_seqlens: int [N+1], boundaries of N documents packed along T; needs B = 1. The state restarts at each.
        backend: auto, or the name of one; which one runs, and why, is logged once.
        cu_seqlens_cpu: the same boundaries on the host, for callers that have them: spares a device wait.

    Returns:
        o [B, T, Hv, V] in v's dtype; the final states [N, Hv, K, V], float32 (float64 for float64 inputs), or None.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is accepted.
    """
    _check(q, k, v, g, beta, initial_state, use_gate_in_kernel, A_log, dt_bias, cu_seqlens, cu_seqlens_cpu)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError(
            "allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True: a beta given as it is may already reach 2"
        )
    options = {
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "allow_neg_eigval": allow_neg_eigval,
    }
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, g, beta, initial_state, A_log, dt_bias)
    )
    call = Call(
        device=torch.device(q.device.type),
        dtype=q.dtype,
        key_dim=k.shape[-1],
        value_dim=v.shape[-1],
        options=frozenset(name for name, on in options.items() if on),
        needs_grad=needs_grad,
    )
    return select(OPERATOR, backend, call).run(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        A_log=A_log,
        dt_bias=dt_bias,
        cu_seqlens=cu_seqlens,
        cu_seqlens_cpu=cu_seqlens_cpu,
        **options,
    )


def _check(q, k, v, g, beta, initial_state, use_gate_in_kernel, A_log, dt_bias, cu_seqlens, cu_seqlens_cpu) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}: give [B, T, H, D]")
        if not x.dtype.is_floating_point or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}: give q, k and v in one floating-point dtype")
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(f"{name} has [B, T] = {list(x.shape[:2])}, q {list(q.shape[:2])}: they must be equal")
    others = {"k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state, "A_log": A_log, "dt_bias": dt_bias}
    for name, x in others.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
    batch, tokens, key_heads, key_dim = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k has shape {list(k.shape)}, q {list(q.shape)}: they must be equal")
    value_heads, value_dim = v.shape[2:]
    if key_heads == 0 or value_heads % key_heads:
        raise ValueError(f"v has {value_heads} heads, which is not a multiple of the {key_heads} heads of q and k")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != v.shape[:3]:
            raise ValueError(f"{name} has shape {list(x.shape)}: give [B, T, Hv] = {list(v.shape[:3])}")
    if use_gate_in_kernel and A_log is None:
        raise ValueError("use_gate_in_kernel=True needs A_log, a float32 tensor [Hv]")
    if not use_gate_in_kernel and (A_log is not None or dt_bias is not None):
        raise ValueError("A_log and dt_bias are read only with use_gate_in_kernel=True: set it, or leave them out")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.shape != (value_heads,):
            raise ValueError(f"{name} has shape {list(x.shape)}: give [Hv] = [{value_heads}]")
    documents = batch
    if cu_seqlens is None and cu_seqlens_cpu is not None:
        raise ValueError("cu_seqlens_cpu was given without cu_seqlens: give both, or only cu_seqlens")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, cu_seqlens_cpu, batch, tokens)
        documents = cu_seqlens.numel() - 1
    if initial_state is not None and initial_state.shape != (documents, value_heads, key_dim, value_dim):
        raise ValueError(
            f"initial_state has shape {list(initial_state.shape)}: "
            f"give [N, Hv, K, V] = {[documents, value_heads, key_dim, value_dim]}"
        )


@torch.compiler.disable  # its loop follows the documents: nothing to gain from tracing it anew for each packing
def _run_torch(*, q, cu_seqlens, cu_seqlens_cpu, **arguments):
    if cu_seqlens is None:
        bounds = dense_bounds(*q.shape[:2])
    else:
        bounds = tuple((cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).tolist())
    # float32 inside, whatever the caller's autocast says
    with named_range(OPERATOR), torch.autocast(q.device.type, enabled=False):
        return chunk_gated_delta_rule_torch(q=q, bounds=bounds, **arguments)


KEY_DIMS, VALUE_DIMS = (64, 96, 128), (64, 96, 128, 192, 256)  # what the Hopper kernels take


def refuses_tilelang(call: Call) -> str | None:
    if reason := refused_by_hopper(call):
        return reason
    if call.key_dim not in KEY_DIMS or call.value_dim not in VALUE_DIMS:
        return f"takes K in {KEY_DIMS} and V in {VALUE_DIMS}, not K={call.key_dim}, V={call.value_dim}"
    return None


def _run_tilelang(**arguments):
    from qlakernels.gated_delta_rule.hopper.operator import run

    return run(**arguments)


register(OPERATOR, Backend("tilelang", refuses_tilelang, _run_tilelang))
register(OPERATOR, Backend("flash_qla", peers.refuses_flash_qla, peers.run_flash_qla))
register(OPERATOR, Backend("fla", peers.refuses_fla, peers.run_fla))
register(OPERATOR, Backend("torch", lambda call: None, _run_torch))
