"""Inputs, the float64 reference, the bars and the judge that the GPU tests of the gated delta rule share.

The judge is the recurrence token by token in float64, through autograd. Python takes it through a few hundred tokens;
beyond `TOKENS_OF_THE_RECURRENCE` the chunked form of the torch backend stands in, in float64 throughout, which
`test_hopper_helpers` holds to the recurrence at 1e-10.
"""

import json
import os
import platform

import torch
import torch.nn.functional as F
from kernel_helpers import HEAD_DIM, bounds_of
from kernel_helpers import make_inputs as make_float32_inputs

from qlakernels import chunk_gated_delta_rule
from qlakernels.gated_delta_rule import recurrent_gated_delta_rule_reference

BACKEND = "tilelang"
DEVICE = "cuda"
TOKENS_OF_THE_RECURRENCE = 300

# Largest error allowed, ‖x − reference‖ / ‖reference‖, for each head of each tensor by itself. A sound kernel that
# hands bf16 operands to the tensor cores reaches 2e-3 to 5e-3 on ordinary input, strong decay and slow (a rounding of
# the result alone is 1.7e-3). The other rows are inputs on which rounding itself adds up; there the bars are what an
# emulation of such a kernel (every operand rounded, float32 accumulation) reaches, and a little more.
#   no decay        g from 0 to -1e-4 with β up to 1: nothing is forgotten, and dg is a sum over all that is left
#   few tokens      one or two: nothing averages the rounding of the few products q·k that make a token of o
#   similar keys    near-identical keys and no decay: all of them correct the same direction
#   reflections     β = 1.98 on random keys and no decay: every token is a reflection
#   few keys        β = 1.98 on 8 distinct keys and no decay: hundreds of reflections of the same directions
#   few keys, long  β < 1 on 8 distinct keys over 16384 tokens; segments stitched in bf16 miss the bars of the states
_ORDINARY = {"o": 4e-3, "final_state": 4e-3, "dq": 6e-3, "dk": 6e-3, "dv": 6e-3, "dinitial_state": 6e-3}
_ORDINARY |= {"dg": 8e-3, "dbeta": 8e-3, "dA_log": 2e-2, "ddt_bias": 2e-2}
BARS = {
    "ordinary": _ORDINARY,
    "no decay": _ORDINARY | {"o": 5e-3, "final_state": 5e-3, "dg": 1.2e-2},
    "few tokens": _ORDINARY | {"o": 5e-3},
    "similar keys": dict.fromkeys(_ORDINARY, 1.5e-2) | {"dk": 2e-2, "dbeta": 2e-2},
    "reflections": dict.fromkeys(_ORDINARY, 1.5e-2) | {"dg": 4e-2},
    "few keys": dict.fromkeys(_ORDINARY, 1.2e-1) | {"dg": 1.6e-1, "dinitial_state": 2e-2},
    "few keys, long": dict.fromkeys(_ORDINARY, 3e-2) | {"final_state": 1.2e-2, "dinitial_state": 6e-3},
}
TINY = 1e-25  # an error below this is none: three strong decays, whose product float32 and its clamps need not hold
WIDE = ("o", "dq", "dk", "dv", "final_state", "dinitial_state")  # K or V numbers a token or more, so that none cancels

MIX = [1, 0, 63, 64, 65, 1000, 0, 1, 128, 2]
L2NORM = {"use_qk_l2norm_in_kernel": True}
GATE = {"use_gate_in_kernel": True}
SIGMOID = {"use_beta_sigmoid_in_kernel": True}
DOUBLED = SIGMOID | {"allow_neg_eigval": True}
ALL_OPTIONS = L2NORM | GATE | DOUBLED

worst_errors: dict[str, dict[str, dict]] = {}  # test → tensor → its worst head


# ---------------------------------------------------------------- inputs


def make_inputs(
    tokens: int | None = None,
    *,
    lengths: list[int] | None = None,
    batch: int = 1,
    key_heads: int = 2,
    value_heads: int = 4,
    key_dim: int = 128,
    value_dim: int = 128,
    g: float | str = "slow",
    beta: float | str = "random",
    keys: str = "random",
    state: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    beta_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Arguments on DEVICE: q, k, v in `dtype`, g and states float32; `lengths` are those of packed documents.

    g: a number; `slow`, in (-0.05, 0); `random`, in (-1, 0); `mixed`, -20 here and -1e-3 there.
    beta: a number; `random`, in (0, 2); `half`, in (0, 1).
    keys: of unit length `random`, `similar`, just `one`, or `few` (8); `long`, of length 0.1 to 1.3 (stable with
        β < 1); `raw`, of length 1e-3 to 10, as are the queries, for normalisation in the kernel, and some are zero.
    """
    tokens = sum(lengths) if tokens is None else tokens
    x = make_float32_inputs(
        tokens,
        seed=seed,
        batch=batch,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        beta="random" if beta == "half" else beta,
        g="random" if g == "slow" else g,
        documents=None if lengths is None else len(lengths),
    )
    random = torch.Generator().manual_seed(seed + 1000)
    x["initial_state"] *= 0.3
    if g == "slow":
        x["g"] *= 0.05
    if beta == "half":
        x["beta"] *= 0.5
    if keys == "similar":
        x["k"] = F.normalize(x["k"][:, :1] + 0.02 * x["k"], dim=-1)
    elif keys == "one":
        x["k"] = x["k"][:, :1].expand_as(x["k"])
    elif keys == "few":
        x["k"] = x["k"][:, torch.randint(0, 8, (tokens,), generator=random)]
    elif keys == "long":
        x["k"] = x["k"] * (0.1 + 1.2 * torch.rand(x["k"].shape[:3], generator=random)[..., None])
    elif keys == "raw":
        x["q"], x["k"] = (
            y * 10 ** (4 * torch.rand(y.shape[:3], generator=random) - 3)[..., None] for y in (x["q"], x["k"])
        )
        x["q"][:, 5::17], x["k"][:, 3::19] = 0, 0
    if not state:
        del x["initial_state"]
    dtypes = {"q": dtype, "k": dtype, "v": dtype, "beta": beta_dtype}
    return {name: y.to(dtypes.get(name, torch.float32)).contiguous().to(DEVICE) for name, y in x.items()}


def with_raw_gates(inputs, *, decay, bias=True, sigmoid=True, gate_dtype=torch.bfloat16, seed=0):
    """The same inputs with g and β as a projection gives them, and A_log = log of `decay` (a number or one a head)."""
    random = torch.Generator().manual_seed(seed + 2000)
    heads = inputs["g"].shape[-1]

    def normal(*shape):
        return torch.randn(shape, generator=random).to(DEVICE)

    inputs = inputs | {"g": (0.5 * normal(*inputs["g"].shape) + 1).to(gate_dtype)}
    inputs["A_log"] = torch.tensor(decay, dtype=torch.float32).log().expand(heads).contiguous().to(DEVICE)
    if bias:
        inputs["dt_bias"] = 0.3 * normal(heads)
    if sigmoid:
        inputs["beta"] = normal(*inputs["beta"].shape).to(inputs["beta"].dtype)
    return inputs


def raw_inputs(*, decay=1.0, bias=True, gate_dtype=torch.bfloat16, **shape):
    """As a model calls the operator: raw q, k, gates and step sizes, for all of `ALL_OPTIONS`."""
    shape = {"keys": "raw", "beta_dtype": torch.bfloat16} | shape
    return with_raw_gates(make_inputs(**shape), decay=decay, bias=bias, gate_dtype=gate_dtype)


def boundaries(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return bounds_of(lengths, dtype).to(DEVICE)


def make_cotangents(inputs: dict[str, torch.Tensor], documents: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What arrives at o, in its dtype, and at the final states."""
    random = torch.Generator().manual_seed(seed + 3000)
    v, key_dim = inputs["v"], inputs["k"].shape[-1]
    return {
        "o": torch.randn(v.shape, generator=random).to(v.dtype).to(DEVICE),
        "final_state": 0.1 * torch.randn(documents, v.shape[2], key_dim, v.shape[3], generator=random).to(DEVICE),
    }


# ---------------------------------------------------------------- the kernels


def run(inputs, **options):
    return chunk_gated_delta_rule(**inputs, backend=BACKEND, **options)


def poison_free_memory() -> None:
    """Fills what the allocator would hand out next with NaN (all bits set): nothing may be taken for zero, or left."""
    if DEVICE != "cuda":
        return
    stream = torch.cuda.current_stream().cuda_stream
    sizes = []
    for segment in torch.cuda.memory_snapshot():
        if segment["stream"] != stream or tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            continue  # of another stream, or of a CUDA graph
        sizes += [
            block["size"]
            for block in segment["blocks"]
            # a large segment serves no request of 1 MiB or less
            if block["state"] == "inactive" and (segment["segment_type"] == "small" or block["size"] > 1 << 20)
        ]
    if sum(sizes) < 256 << 20:  # the first time there is little to fill
        sizes += [64 << 20] * 4 + [2 << 20] * 8 + [64 << 10] * 16
    held = []
    for size in sorted(sizes, reverse=True):
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE).fill_(255))
        except torch.OutOfMemoryError:  # a block was rounded up, and nothing is left to be poisoned
            break
    del held


def evaluate(inputs, cotangents, **options) -> dict[str, torch.Tensor]:
    """o, final_state, and d<name> for each input; free memory is poisoned before the forward and the backward."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    poison_free_memory()
    o, final_state = run(leaves, output_final_state=True, **options)
    assert o.dtype == inputs["v"].dtype and o.shape == inputs["v"].shape
    assert final_state.dtype == torch.float32
    poison_free_memory()
    gradients = gradients_of(o, final_state, leaves, cotangents)
    for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape, f"gradient of {name}"
    return results(o, final_state, leaves, gradients)


def gradients_of(o, final_state, leaves, cotangents):
    """Of every leaf. An output of no numbers may come without a graph."""
    outputs = {name: x for name, x in (("o", o), ("final_state", final_state)) if x.requires_grad or x.numel()}
    return torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        [cotangents[name] for name in outputs],
        materialize_grads=True,
    )


def results(o, final_state, names, gradients) -> dict[str, torch.Tensor]:
    named = {f"d{name}": x for name, x in zip(names, gradients, strict=True)}
    return {"o": o.detach(), "final_state": final_state.detach()} | named


# ---------------------------------------------------------------- the reference


def chunked_reference(
    g,
    beta,
    A_log=None,
    dt_bias=None,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    **arguments,
):
    """The arguments of `recurrent_gated_delta_rule_reference`, in float64; gates here, where they stay float64."""
    if use_gate_in_kernel:
        g = -A_log.exp() * F.softplus(g if dt_bias is None else g + dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    return chunk_gated_delta_rule(g=g, beta=beta, backend="torch", output_final_state=True, **arguments)


def reference(inputs, cotangents, **options) -> dict[str, torch.Tensor]:
    """As `evaluate`, in float64."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    if options.get("cu_seqlens") is not None:
        options = options | {"cu_seqlens": options["cu_seqlens"].cpu()}
    options = {name: value for name, value in options.items() if name != "cu_seqlens_cpu"}
    short = 0 < inputs["v"].shape[1] <= TOKENS_OF_THE_RECURRENCE
    o, final_state = (recurrent_gated_delta_rule_reference if short else chunked_reference)(**leaves, **options)
    gradients = gradients_of(o, final_state, leaves, {name: x.double() for name, x in cotangents.items()})
    return results(o, final_state, leaves, gradients)


def natural_sizes(inputs, expected, alike: bool) -> dict[str, torch.Tensor]:
    """Sizes [H], or one for all heads, that a bar may refer to where that of a head itself is small by chance or zero.

    Few tokens have few numbers, all of which may happen to be small: where the heads are drawn alike, the largest says
    what is usual. (Of many tokens, all heads are of one size.) dk and dv carry a factor β that dbeta does not: with
    β = 0 they are zero, up to 1e-2 of a bar of dbeta. dA_log and ddt_bias are sums over tokens whose terms cancel: the
    root of the sum of squares of the terms, or the largest sum of the first terms where it is more. With slow decay it
    is: neighbouring terms are made of the same later tokens, and so are their errors. (All exact but the operands of
    products, rounded to bf16; 271 tokens, A = 0.05, 4 heads, 15 draws: errors of 0.5e-2 to 2.3e-2 whatever the sums,
    which are 2 to 6 as a rule, and once below 0.8 in all heads. Earlier: up to 2.9e-2 of the root, dg off by 5e-3.)
    """
    sizes = {}
    if alike:
        sizes = {name: head_norms(x, name).max() for name, x in expected.items() if len(head_norms(x, name))}
    for name in ("dk", "dv"):
        factored_out = 1e-2 * expected["dbeta"].norm() / expected[name].shape[2] ** 0.5
        sizes[name] = torch.maximum(factored_out, sizes.get(name, factored_out))
    if "A_log" in inputs:
        raw = inputs["g"].double() + (inputs["dt_bias"].double() if "dt_bias" in inputs else 0)
        terms = {"dA_log": expected["dg"] * F.softplus(raw) / raw.sigmoid(), "ddt_bias": expected["dg"]}
        for name, x in terms.items():
            root = x.flatten(0, 1).norm(dim=0)
            along = x.cumsum(1).abs().amax((0, 1)) if x.numel() else root
            sizes[name] = torch.maximum(torch.maximum(root, along), sizes.get(name, root))
    return sizes


# ---------------------------------------------------------------- the judge


def head_norms(x: torch.Tensor, name: str) -> torch.Tensor:
    """‖x‖ for each head, [H]"""
    x = x.movedim(HEAD_DIM.get(name.removeprefix("d"), 2), 0)
    return x.reshape(x.shape[0], -1).norm(dim=1) if x.numel() else x.new_zeros(x.shape[0])


def judge(got, expected, bars="ordinary", sizes=None, factor=1.0, label="") -> None:
    """Each head of each tensor of `expected` within `factor` times its bar; says the worst of all that are not."""
    failures = []
    for name, reference_x in expected.items():
        x, reference_x = got[name].detach().double(), reference_x.detach().double()
        assert x.shape == reference_x.shape, f"{label}{name}: {list(x.shape)} for {list(reference_x.shape)}"
        bar = BARS[bars][name] * factor
        size = head_norms(reference_x, name)
        if sizes is not None and name in sizes:
            size = torch.maximum(size, sizes[name].to(size))
        error = head_norms(x - reference_x, name)
        ratio = (error / (size + TINY / bar)).nan_to_num(nan=float("inf"))
        head = int(ratio.argmax()) if len(ratio) else 0
        worst = ratio[head].item() if len(ratio) else 0.0
        record(f"{label}{name}", worst, head, bar)
        if not worst <= bar:
            failures.append(
                f"{label}{name}, head {head}: relative error {worst:.2e}, bar {bar:.1e} "
                f"(error {error[head].item():.2e} of {size[head].item():.2e}; heads over it: "
                f"{(~(ratio <= bar)).nonzero().flatten().tolist()}; not finite: {int((~x.isfinite()).sum())})"
            )
    assert not failures, f"{bars} bars:\n  " + "\n  ".join(failures)


def judge_documents(got, expected, lengths, bars="ordinary") -> None:
    """Each document by itself, all heads together, within twice the bar: a long one must not hide a short one."""
    failures, start = [], 0
    for n, length in enumerate(lengths):
        for name in WIDE:
            if name not in expected:
                continue
            where = (n,) if name.endswith("state") else (0, slice(start, start + length))
            x, reference_x = got[name][where].double(), expected[name][where].double()
            error, size, bar = (x - reference_x).norm().item(), reference_x.norm().item(), 2 * BARS[bars][name]
            if not error <= bar * size + TINY:
                failures.append(
                    f"{name} of document {n} (length {length}): error {error:.2e} of {size:.2e}, bar {bar:.1e}"
                )
        start += length
    assert not failures, "\n  ".join(["documents by themselves:", *failures])


def check(inputs, bars="ordinary", *, alike=True, lengths=None, seed=0, **options):
    """The kernels against the reference, outputs and every gradient. Returns what both gave."""
    if lengths is not None:
        options = {"cu_seqlens": boundaries(lengths)} | options
    documents = len(inputs["v"]) if lengths is None else len(lengths)
    cotangents = make_cotangents(inputs, documents, seed)
    expected = reference(inputs, cotangents, **options)
    got = evaluate(inputs, cotangents, **options)
    judge(got, expected, bars, natural_sizes(inputs, expected, alike))
    if lengths is not None:
        judge_documents(got, expected, lengths, bars)
    return got, expected


def assert_same_bits(got, expected) -> None:
    for name, x in expected.items():
        if not torch.equal(got[name], x):
            different = got[name] != x
            raise AssertionError(
                f"{name}: {int(different.sum())} of {x.numel()} numbers differ, the first at "
                f"{different.nonzero()[0].tolist()}, by at most {(got[name].double() - x.double()).abs().max():.2e}"
            )


# ---------------------------------------------------------------- the record


def record(tensor: str, error: float, head: int, bar: float) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0].rpartition("::")[2]
    tensors = worst_errors.setdefault(test, {})
    if tensor not in tensors or not error <= tensors[tensor]["error"]:
        tensors[tensor] = {"error": error, "head": head, "bar": bar}


def write_record(path: str) -> None:
    """Worst error for each test and tensor, and over all tests as a fraction of the bar, with what they ran on."""
    closest: dict[str, dict] = {}
    for test, tensors in worst_errors.items():
        for name, x in tensors.items():
            fraction = x["error"] / x["bar"]
            name = name.rpartition(" ")[2]
            if name not in closest or not fraction <= closest[name]["fraction_of_bar"]:
                closest[name] = {"fraction_of_bar": fraction, "error": x["error"], "test": test}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "device": device}
    with open(path, "w") as file:
        json.dump({"versions": versions, "closest_to_the_bar": closest, "tests": worst_errors}, file, indent=1)
