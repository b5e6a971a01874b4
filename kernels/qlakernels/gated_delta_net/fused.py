"""The mixer on Hopper as one differentiable torch operator: kernels of its parts, launched one after the other.

Kept for the backward, per token: joint as it came, o, what the rule keeps (W, a state every 256 tokens) and, if asked
for, q and k as the rule had them; else a pass over both makes them anew. The norm's output is made anew beside its
gradients. All gradients of joint are written where they belong in one tensor.
"""

import torch

from qlakernels.gated_delta_net.api import Heads
from qlakernels.gated_delta_rule.hopper import operator as rule
from qlakernels.norm.hopper import operator as norm
from qlakernels.operators import below_autograd, define, differentiate, differentiate_no_further
from qlakernels.products import weight_gradient
from qlakernels.short_conv.hopper import operator as convolution

IN_OPERATOR = (True, True, True)  # normalised q and k, the decay and the step size made of raw gates


def run(
    joint, conv_weight, A_log, dt_bias, norm_weight, out_weight, heads, out_cast, eps, neg, position_ids, cu, cu_cpu,
    keep_convolved,
):  # fmt: skip
    """As `gated_delta_net`."""
    if cu is not None:
        cu = cu.to(joint.device, torch.int32, non_blocking=True)
    out_cast = out_weight.to(joint.dtype) if out_cast is None else out_cast
    tensors = joint, conv_weight, A_log, dt_bias, norm_weight, out_weight
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    sizes = [heads.key_heads, heads.key_dim, heads.value_heads, heads.value_dim]
    return _forward_op(*tensors, out_cast.detach(), position_ids, cu, sizes, eps, neg, keep, keep_convolved)[0]


def _convolve(joint, conv_weight, position_ids, keep, first, last):
    """Channels from `first` to `last`, [B, T, last − first]."""
    out = joint.new_empty(*joint.shape[:2], last - first)
    convolution.launch_forward(joint[..., first:last], conv_weight[first:last], position_ids, True, keep, out)
    return out


def _forward(
    joint, conv_weight, A_log, dt_bias, norm_weight, out_weight, out_cast, position_ids, cu, sizes, eps, neg, keep,
    keep_convolved,
):  # fmt: skip
    """The output; o, W, states, the order of the documents, and q and k side by side for the backward, empty where they
    are not wanted."""
    heads = Heads(*sizes)
    _, z, a, b = heads.parts(joint)
    together = _convolve(joint, conv_weight, position_ids, keep, 0, 2 * heads.keys)
    q, k, _ = heads.by_heads(together)
    v = _convolve(joint, conv_weight, position_ids, keep, 2 * heads.keys, heads.convolved).unflatten(-1, sizes[2:])
    o, _, W, states, _, order = rule._forward(
        q, k, v, a, b, cu, A_log, dt_bias, None, heads.key_dim**-0.5, False, *IN_OPERATOR, neg, keep
    )
    y = torch.empty_like(o)
    norm.launch_forward(o, z, norm_weight, eps, y)
    kept = o if keep else o.new_empty(0), W, states, order, together if keep and keep_convolved else o.new_empty(0)
    return torch.matmul(y.flatten(-2), out_cast.t()), *kept


def _forward_fake(
    joint, conv_weight, A_log, dt_bias, norm_weight, out_weight, out_cast, _, cu, sizes, eps, neg, keep, keep_convolved
):
    heads, (batch, tokens) = Heads(*sizes), joint.shape[:2]
    q = joint.new_empty(batch, tokens, heads.key_heads, heads.key_dim)
    v = joint.new_empty(batch, tokens, heads.value_heads, heads.value_dim)
    o, _, W, states, _, order = rule._forward_fake(
        q, q, v, None, None, cu, A_log, dt_bias, None, 1.0, False, *IN_OPERATOR, neg, keep
    )
    together = joint.new_empty((batch, tokens, 2 * heads.keys) if keep and keep_convolved else 0)
    kept = o if keep else o.new_empty(0), W, states, order, together
    return joint.new_empty(batch, tokens, out_weight.shape[0]), *kept


def _backward(
    dout, joint, o, W, states, order, together, conv_weight, A_log, dt_bias, norm_weight, out_cast, position_ids, cu,
    sizes, eps, neg, out_dtype,
):  # fmt: skip
    """Gradients of joint, and of the weights: the filters', those of A_log and dt_bias as one [2, Hv], the norm's, all
    float32, and the output projection's."""
    heads = Heads(*sizes)
    _, z, a, b = heads.parts(joint)
    djoint = torch.empty_like(joint, memory_format=torch.contiguous_format)
    dx, dz, da, db = heads.parts(djoint)
    djoint[..., heads.joint[-1] :].zero_()
    dy, y, do = torch.matmul(dout, out_cast).view(o.shape), torch.empty_like(o), torch.empty_like(o)
    d_norm_weight = norm.launch_backward(dy, o, z, norm_weight, eps, do, dz, y)
    d_out_weight = weight_gradient(dout.flatten(0, 1), y.view(-1, heads.values), out_dtype)
    del dy, y
    if together.numel() == 0:  # of q and k alone: W is kept for v
        together = _convolve(joint, conv_weight, position_ids, True, 0, 2 * heads.keys)
    q, k, _ = heads.by_heads(together)
    first_states = states.new_empty(0, heads.value_heads, heads.value_dim, heads.key_dim)
    dqkv = joint.new_empty(*joint.shape[:2], heads.convolved)
    *_, d_parameters, _ = rule._backward(
        q, k, a, b, W, states, first_states, do, None, cu, order, A_log, dt_bias, False, heads.key_dim**-0.5,
        *IN_OPERATOR, neg, None, (*heads.by_heads(dqkv), da, db),
    )  # fmt: skip
    x = joint[..., : heads.convolved]
    d_conv_weight = convolution.launch_backward(dqkv, x, conv_weight, position_ids, True, dx)
    return djoint, d_conv_weight, d_parameters, d_norm_weight, d_out_weight


def _backward_fake(
    dout, joint, o, W, states, order, together, conv_weight, A_log, dt_bias, norm_weight, out_cast, position_ids, cu,
    sizes, eps, neg, out_dtype,
):  # fmt: skip
    float32 = {"dtype": torch.float32}
    return (
        joint.new_empty(joint.shape),
        conv_weight.new_empty(conv_weight.shape, **float32),
        A_log.new_empty(2, A_log.shape[0], **float32),
        norm_weight.new_empty(norm_weight.shape, **float32),
        out_cast.new_empty(out_cast.shape, dtype=out_dtype),
    )


_forward_op = define(
    "gated_delta_net(Tensor joint, Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor norm_weight, "
    "Tensor out_weight, Tensor out_cast, Tensor? position_ids, Tensor? cu_seqlens, int[] sizes, float eps, bool neg, "
    "bool keep, bool keep_convolved) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "gated_delta_net_backward(Tensor dout, Tensor joint, Tensor o, Tensor W, Tensor states, Tensor order, "
    "Tensor together, Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor norm_weight, Tensor out_cast, "
    "Tensor? position_ids, Tensor? cu_seqlens, int[] sizes, float eps, bool neg, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _GatedDeltaNet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, *inputs):
        joint, *weights, out_weight, out_cast, position_ids, cu, sizes, eps, neg, _, _ = inputs
        outputs = below_autograd(_forward_op, keyset, *inputs)
        kept = outputs[1:]
        ctx.save_for_backward(joint, *kept, *weights, out_cast, position_ids, cu)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.out_dtype = (sizes, eps, neg), out_weight.dtype
        return outputs

    @staticmethod
    def backward(ctx, dout, *_):
        _, _, _, _, _, _, conv_weight, A_log, dt_bias, norm_weight, *_ = ctx.saved_tensors
        djoint, d_conv, d_parameters, d_norm, d_out = _backward_op(
            dout, *ctx.saved_tensors, *ctx.options, ctx.out_dtype
        )
        return (
            None,
            djoint,
            d_conv.to(conv_weight.dtype),
            d_parameters[0].to(A_log.dtype),
            d_parameters[1].to(dt_bias.dtype),
            d_norm.to(norm_weight.dtype),
            d_out,
            *[None] * 8,
        )


def _autograd(keyset, *inputs):
    """The last input but one says whether gradients are wanted."""
    return _GatedDeltaNet.apply(keyset, *inputs) if inputs[-2] else below_autograd(_forward_op, keyset, *inputs)


differentiate(_forward_op, _autograd)
differentiate_no_further(_backward_op, "the mixer")
