"""Other libraries' kernels of the gated delta rule as backends: flash-linear-attention (Triton), FlashQLA (TileLang).

Both are optional (`pip install .[peers]`). What they do not take (the gate and β inside the operator) is computed
here in float32 before the call, so that every backend is the same function of the same arguments.
"""

import os

import torch

from qlakernels.backends import Call, installed
from qlakernels.gated_delta_rule.gates import log_decay, step_size
from qlakernels.ranges import named_range

FLA_SWITCH = "FLA_FLASH_QLA"  # FLA 0.6.0 reads it at each call; 0: it does not hand calls to FlashQLA
HALF = (torch.bfloat16, torch.float16)


def _refuses(call: Call, distribution: str) -> str | None:
    if call.device.type != "cuda":
        return f"needs a GPU, the tensors are on {call.device.type}"
    if installed(distribution) is None:
        return f"{distribution} is not installed"
    if call.dtype not in HALF:
        return f"takes bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    return None


def refuses_flash_qla(call: Call) -> str | None:
    reason = _refuses(call, "flash-qla")
    if reason is None and torch.cuda.get_device_capability()[0] < 9:
        reason = f"needs compute capability 9.0, this GPU has {torch.cuda.get_device_capability()}"
    if reason is None and (call.key_dim, call.value_dim) != (128, 128):
        reason = f"takes K = V = 128, not K={call.key_dim}, V={call.value_dim}"
    return reason


def refuses_fla(call: Call) -> str | None:
    return _refuses(call, "flash-linear-attention")


def run_flash_qla(**arguments):
    from flash_qla import chunk_gated_delta_rule

    return _run(chunk_gated_delta_rule, **arguments)


def run_fla(**arguments):
    os.environ.setdefault(FLA_SWITCH, "0")  # or some calls would go to FlashQLA, unsaid
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _run(chunk_gated_delta_rule, **arguments)


def _run(
    function,
    *,
    g,
    beta,
    use_gate_in_kernel,
    A_log,
    dt_bias,
    use_beta_sigmoid_in_kernel,
    allow_neg_eigval,
    cu_seqlens,
    cu_seqlens_cpu,
    **arguments,
):
    with named_range("gated_delta_rule"):
        if use_gate_in_kernel:
            g = log_decay(g, A_log, dt_bias)
        if use_beta_sigmoid_in_kernel:
            beta = step_size(beta, allow_neg_eigval)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.long()
        return function(g=g.float(), beta=beta.float(), cu_seqlens=cu_seqlens, **arguments)
