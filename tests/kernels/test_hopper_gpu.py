"""The TileLang kernels of the gated delta rule on a Hopper GPU, against the recurrence in float64 through autograd.

Every tensor and every head by itself, at the bars of `hopper_helpers`; free memory is full of NaN before each call.
With QLATRAIN_ERRORS_JSON set, the worst error of each test and tensor is written to that file.
"""

import math
import random

import hopper_helpers
import pytest
import torch
import torch.nn.functional as F
from hopper_helpers import (
    ALL_OPTIONS,
    DOUBLED,
    GATE,
    L2NORM,
    MIX,
    SIGMOID,
    assert_same_bits,
    boundaries,
    check,
    evaluate,
    judge,
    make_cotangents,
    make_inputs,
    natural_sizes,
    poison_free_memory,
    raw_inputs,
    reference,
    results,
    run,
    with_raw_gates,
)

from qlakernels.compiled import launcher
from qlakernels.gated_delta_rule.hopper import operator
from qlakernels.gated_delta_rule.hopper.boundaries import MOST
from qlakernels.gated_delta_rule.hopper.kernels import rows_of_many_scans
from qlakernels.gated_delta_rule.hopper.reach import BEYOND

pytestmark = pytest.mark.gpu

HEAD_SIZES = [(key_dim, value_dim) for key_dim in (64, 96, 128) for value_dim in (64, 96, 128, 192, 256)]


# ---------------------------------------------------------------- shapes


def plan_of(monkeypatch, part=None, segment=0, section=None):
    """Makes calls take blocks of `part` rows of V, and segments and sections of so many tokens."""

    def plan(q, cu_seqlens, heads, value_dim, alone=True):
        documents, (batch, tokens) = operator._documents(q, cu_seqlens), q.shape[:2]
        turns = batch * tokens // segment + documents if segment else documents
        return operator.Plan(min(part or 128, rows_of_many_scans(value_dim)), turns, segment, section or segment)

    monkeypatch.setattr(operator, "_plan", plan)


@pytest.mark.parametrize(("part", "segment"), [(64, 0), (128, 0), (128, 256)], ids=["64", "128", "segments"])
@pytest.mark.parametrize(("key_dim", "value_dim"), HEAD_SIZES)
def test_head_sizes(key_dim, value_dim, part, segment, monkeypatch):
    """With blocks of 64 rows of V, as where scans are few, of 128, and in segments."""
    plan_of(monkeypatch, part, segment)
    shape = {"key_dim": key_dim, "value_dim": value_dim}
    lengths = [70, 0, 1, 200, 600 if segment else 5]
    check(raw_inputs(lengths=lengths, decay=0.05, **shape), lengths=lengths, **ALL_OPTIONS)
    check(raw_inputs(tokens=600, batch=2, seed=1, **shape), seed=1, **ALL_OPTIONS)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (128, 128), (96, 192)])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_group_ratios(group, key_dim, value_dim):
    shape = {"key_heads": 2, "value_heads": 2 * group, "key_dim": key_dim, "value_dim": value_dim}
    check(make_inputs(lengths=[130, 1, 69], **shape), lengths=[130, 1, 69])
    check(raw_inputs(tokens=321, batch=2, **shape), **ALL_OPTIONS)


def test_many_value_heads_of_one_key_head():
    check(make_inputs(320, batch=2, key_heads=1, value_heads=16))


def test_many_heads():
    """More blocks than the chip has places for."""
    check(make_inputs(320, batch=2, key_heads=32, value_heads=96))


def test_raw_gates_of_heads_that_fill_no_block():
    """The gradients of the gates go by 16 heads."""
    check(raw_inputs(tokens=200, key_heads=5, value_heads=20), **ALL_OPTIONS)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 257, 1000])
def test_lengths(tokens, state, batch):
    check(make_inputs(tokens, batch=batch, state=state), "few tokens" if tokens <= 2 else "ordinary")


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("g", ["slow", -1e-3])
@pytest.mark.parametrize("tokens", [8192, 8192 + 65, 65536])
def test_long_sequences_with_few_heads(tokens, g, group):
    """One row of few heads: the scan is cut into segments, through which a slow decay must carry the state."""
    check(make_inputs(tokens, key_heads=1, value_heads=group, g=g, beta="half"))


def test_long_sequence_with_raw_gates():
    inputs = raw_inputs(tokens=16384, batch=2, key_heads=1, value_heads=2, decay=1e-3)
    check(inputs, **L2NORM | GATE | SIGMOID)


def test_long_packed_documents():
    draw = random.Random(0)
    cuts = sorted(draw.sample(range(1, 65536), 11))
    lengths = [end - start for start, end in zip([0, *cuts, cuts[-1]], [*cuts, cuts[-1], 65536], strict=True)]
    assert lengths[-2] == 0 and sum(lengths) == 65536
    check(make_inputs(lengths=lengths, key_heads=1, value_heads=2, g=-1e-3, beta="half"), lengths=lengths)


@pytest.mark.parametrize("g", [-1e-3, "slow", 0.0])
def test_one_row_is_a_row_of_many(g):
    """The same row alone, where it is cut into segments, and among so many that nothing is."""
    one = make_inputs(4096, key_heads=1, value_heads=2, g=g, beta="half")
    many = {name: x.repeat(96, *[1] * (x.dim() - 1)) for name, x in one.items()}
    got = evaluate(one, make_cotangents(one, 1))
    cotangents = {name: x.repeat(96, 1, 1, 1) for name, x in make_cotangents(one, 1).items()}
    among_many = evaluate(many, cotangents)
    bars = "no decay" if g == 0.0 else "ordinary"
    for row in (0, 95):
        judge({name: x[row : row + 1] for name, x in among_many.items()}, got, bars, label="among many, ")
    expected = reference(one, make_cotangents(one, 1))
    judge(got, expected, bars)


# ---------------------------------------------------------------- packed documents


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("g", ["slow", -1e-4, "mixed"])
@pytest.mark.parametrize(
    "lengths",
    [
        MIX,
        [0, 0, 5],
        [7, 0, 0],
        [0, 64, 0, 64, 0],
        [1] * 70,
        [65, 1, 200, 0, 64, 30],
        [1000],
        list(range(40)),
        [128, 192],
    ],
    ids=lambda lengths: "-".join(map(str, lengths[:6])),
)
def test_packed_mixes(lengths, g, key_heads):
    bars = "no decay" if g == -1e-4 else "ordinary"
    check(make_inputs(lengths=lengths, g=g, beta="half", key_heads=key_heads), bars, lengths=lengths)


def test_packed_with_raw_gates():
    """A = 0.05 keeps a state for hundreds of tokens, so that a document that sees its neighbour is far off."""
    check(raw_inputs(lengths=MIX, decay=0.05), lengths=MIX, **ALL_OPTIONS)


def test_many_documents():
    lengths = [random.Random(1).choice([0, 1, 2, 3, 60, 64, 65, 130]) for _ in range(300)]
    check(make_inputs(lengths=lengths, key_heads=1, value_heads=2), lengths=lengths)


@pytest.mark.parametrize("documents", [1, 7, 128, 1000, 5000])
def test_longest_documents_first(documents):
    draw = random.Random(documents)
    lengths = [draw.choice([0, 1, 63, 64, 900]) for _ in range(documents)]
    order = torch.full((documents,), -1, dtype=torch.int32, device=hopper_helpers.DEVICE)
    launcher(("boundaries",))(boundaries(lengths), order, sum(lengths))
    longest_first = sorted(range(documents), key=lambda n: -lengths[n])
    assert order.tolist() == (longest_first if documents <= MOST else list(range(documents)))


def test_documents_alone():
    lengths = [65, 1, 200, 0, 64, 30]
    inputs = make_inputs(lengths=lengths, g=-1e-3)
    cotangents = make_cotangents(inputs, len(lengths))
    packed = evaluate(inputs, cotangents, cu_seqlens=boundaries(lengths))
    start = 0
    for n, length in enumerate(lengths):

        def of_document(tensors, n=n, tokens=slice(start, start + length)):
            return {name: x[n : n + 1] if name.endswith("state") else x[:, tokens] for name, x in tensors.items()}

        alone = evaluate(of_document(inputs), of_document(cotangents))
        expected = reference(of_document(inputs), of_document(cotangents))
        judge(of_document(packed), alone, sizes=natural_sizes(of_document(inputs), expected, True))
        start += length


def test_dense_batch_is_packed_equal_lengths():
    inputs = make_inputs(200, batch=3)
    cotangents = make_cotangents(inputs, 3)

    def flat(tensors):
        return {name: x if name.endswith("state") else x.flatten(0, 1)[None] for name, x in tensors.items()}

    dense = flat(evaluate(inputs, cotangents))
    packed = evaluate(flat(inputs), flat(cotangents), cu_seqlens=boundaries([200] * 3))
    expected = flat(reference(inputs, cotangents))
    judge(dense, expected, label="dense ")
    judge(packed, expected, label="packed ")
    judge(packed, dense)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("on_host_too", [False, True])
def test_boundaries_of_either_integer_type(dtype, on_host_too):
    inputs = make_inputs(lengths=MIX)
    cotangents = make_cotangents(inputs, len(MIX))
    expected = evaluate(inputs, cotangents, cu_seqlens=boundaries(MIX))
    cu_seqlens = boundaries(MIX, dtype)
    on_host = {"cu_seqlens_cpu": cu_seqlens.cpu()} if on_host_too else {}
    assert_same_bits(evaluate(inputs, cotangents, cu_seqlens=cu_seqlens, **on_host), expected)


def test_empty_documents_hand_their_state_on():
    lengths = [0, 70, 0, 0, 1, 0]
    inputs = make_inputs(lengths=lengths)
    cotangents = make_cotangents(inputs, len(lengths))
    got = evaluate(inputs, cotangents, cu_seqlens=boundaries(lengths))
    empty = [n for n, length in enumerate(lengths) if length == 0]
    assert torch.equal(got["final_state"][empty], inputs["initial_state"][empty])
    assert torch.equal(got["dinitial_state"][empty], cotangents["final_state"][empty])
    del inputs["initial_state"]
    got = evaluate(inputs, cotangents, cu_seqlens=boundaries(lengths))
    assert got["final_state"][empty].abs().max() == 0


@pytest.mark.parametrize("lengths", [None, [0, 0]])
def test_no_tokens(lengths):
    inputs = make_inputs(0, lengths=lengths, batch=1 if lengths else 2)
    cotangents = make_cotangents(inputs, 2)
    got = evaluate(inputs, cotangents, cu_seqlens=None if lengths is None else boundaries(lengths))
    assert got["o"].numel() == 0
    assert torch.equal(got["final_state"], inputs["initial_state"])
    assert torch.equal(got["dinitial_state"], cotangents["final_state"])


def test_padding_is_exactly_zero():
    """Padding as a last document of zeros: nothing comes out of it, whatever lies in the states before it."""
    lengths = [70, 1, 64, 100]
    inputs = make_inputs(lengths=lengths)
    cotangents = make_cotangents(inputs, len(lengths))
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, 135:] = 0
    inputs["initial_state"][3] = 0
    cotangents["final_state"][3] = 0
    got = evaluate(inputs, cotangents, cu_seqlens=boundaries(lengths))
    for name in ("o", "dq", "dk", "dv", "dg"):
        assert got[name][:, 135:].abs().max() == 0, name
    assert got["final_state"][3].abs().max() == 0
    judge(got, reference(inputs, cotangents, cu_seqlens=boundaries(lengths)))


def test_a_document_has_no_gradient_from_its_neighbours():
    lengths = [70, 0, 70]
    inputs = make_inputs(lengths=lengths, g=-1e-3)
    cotangents = make_cotangents(inputs, 3)
    cotangents["o"][:, :70] = 0
    cotangents["final_state"][0] = 0
    got = evaluate(inputs, cotangents, cu_seqlens=boundaries(lengths))
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        assert got[name][:, :70].abs().max() == 0, name
        assert got[name][:, 70:].abs().max() > 0, name
    assert got["dinitial_state"][0].abs().max() == 0


@pytest.mark.parametrize("key_dim, value_dim", [(128, 128), (96, 192)])
def test_a_document_of_nan_stays_alone(key_dim, value_dim):
    """A last chunk is shorter than a tile, and what is read past its end is the neighbour: 0 · NaN must not enter."""
    lengths = [65, 70, 1, 63, 300]
    inputs = make_inputs(lengths=lengths, key_dim=key_dim, value_dim=value_dim)
    cotangents = make_cotangents(inputs, len(lengths))
    clean = evaluate(inputs, cotangents, cu_seqlens=boundaries(lengths))
    broken, broken_cotangents = ({name: x.clone() for name, x in y.items()} for y in (inputs, cotangents))
    for x in (*(broken[name] for name in ("q", "k", "v", "g", "beta")), broken_cotangents["o"]):
        x[:, 65:135] = float("nan")
        x[:, 136:199] = float("inf")
    for x in (broken["initial_state"], broken_cotangents["final_state"]):
        x[[1, 3]] = float("nan")
    got = evaluate(broken, broken_cotangents, cu_seqlens=boundaries(lengths))
    sound_tokens = [*range(65), 135, *range(199, 499)]
    for name, x in clean.items():
        where = ([0, 2, 4],) if name.endswith("state") else (slice(None), sound_tokens)
        assert torch.equal(got[name][where], x[where]), name


# ---------------------------------------------------------------- values


def bars_of(beta, g):
    if g not in (0.0, -1e-4):
        return "ordinary"
    return "reflections" if beta == 1.98 else "no decay"


@pytest.mark.parametrize("g", [0.0, -1e-4, "mixed", -20.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.98])
@pytest.mark.parametrize("tokens", [200, 1000])
def test_decays_and_step_sizes(tokens, beta, g):
    check(make_inputs(tokens, beta=beta, g=g), bars_of(beta, g))


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.98])
@pytest.mark.parametrize("g", [-1e-4, -20.0])
def test_decays_and_step_sizes_at_96_192(beta, g):
    check(make_inputs(500, beta=beta, g=g, key_dim=96, value_dim=192), bars_of(beta, g))


@pytest.mark.parametrize("beta", [0.0, "mixed"])
def test_step_sizes_of_zero(beta):
    """Also single ones among others, and some so small that a division by them would overflow."""
    inputs = make_inputs(300, beta=0.0 if beta == 0.0 else "random", g="slow")
    if beta == "mixed":
        inputs["beta"][:, ::5] = 0
        inputs["beta"][:, 1::17] = 1e-9
        inputs["beta"][:, 2::13] = 1e-38
    got, _ = check(inputs)
    assert got["dv"][:, ::5].abs().max() <= 1e-5 and got["dk"][:, ::5].abs().max() <= 1e-3


def test_heads_of_very_different_decay():
    """A strong head beside a slow one: each must be right at its own size."""
    inputs = make_inputs(1000, key_heads=1, value_heads=4, beta="half")
    inputs["g"] = torch.tensor([-20.0, -3.0, -1e-2, -1e-5]).to(inputs["g"]).expand_as(inputs["g"]).contiguous()
    check(inputs, "no decay", alike=False)


def test_decay_beyond_float32():
    """exp of these is zero: no token sees another one."""
    inputs = make_inputs(200, g=-1e4)
    check(inputs)
    inputs["g"][:, ::2] = 0
    check(inputs)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("g", [0.0, "slow", "random"])
def test_near_identical_keys(g, seed):
    check(make_inputs(1000, keys="similar", beta="half", g=g, seed=seed), "similar keys", seed=seed)


@pytest.mark.parametrize("g", ["slow", "random"])
def test_one_key(g):
    """The same key from the first token to the last."""
    check(make_inputs(1000, keys="one", beta="half", g=g), "similar keys")


@pytest.mark.parametrize("g", [0.0, -1e-3])
@pytest.mark.parametrize("beta", ["half", 1.98])
def test_few_distinct_keys(beta, g):
    check(make_inputs(1000, keys="few", beta=beta, g=g), "few keys" if beta == 1.98 else "similar keys")


@pytest.mark.parametrize(("segment", "section"), [(256, 256), (512, 256), (768, 256), (1024, 512), (1024, 1024)])
@pytest.mark.parametrize("g", [0.0, -1e-3, "slow", "random", "mixed", -20.0])
def test_segments(g, segment, section, monkeypatch):
    """Cut where they would not be: documents that fill segments, and just do not, or have one token in the last."""
    plan_of(monkeypatch, segment=segment, section=section)
    lengths = [1, 512, 0, 513, 1024, 1023, 1300, 2049, 63]
    bars = "no decay" if g == 0.0 else "ordinary"
    check(make_inputs(lengths=lengths, g=g, beta="half"), bars, lengths=lengths, **L2NORM)


@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
def test_segments_of_a_batch(state, monkeypatch):
    plan_of(monkeypatch, segment=512, section=256)
    check(raw_inputs(tokens=1000, batch=3, state=state, decay=0.02), **ALL_OPTIONS)


def test_segments_of_keys_of_any_length(monkeypatch):
    """No bound of what is left of a state: nothing is skipped."""
    plan_of(monkeypatch, segment=256)
    check(make_inputs(1000, keys="long", beta="half", g=-1.0))


@pytest.mark.parametrize("section", [512, 256, 128])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("entered", [0, 1])
def test_reach(reverse, entered, section):
    """What has to be seen of each section for what leaves its segment, against sums in float64."""
    segment, heads, lengths = 512, 20, [1300, 0, 70, 512, 2048, 513]
    inputs = with_raw_gates(make_inputs(lengths=lengths, key_heads=heads, value_heads=heads), decay=0.3)
    g, beta = inputs["g"][0], inputs["beta"][0]
    cu = boundaries(lengths)
    slots, cuts, steps = sum(lengths) // 64 + len(lengths), sum(lengths) // section + len(lengths), 3
    bounds = torch.full((slots, heads), float("nan"), device=hopper_helpers.DEVICE)
    reaches = torch.full((cuts, heads), -1, dtype=torch.int32, device=hopper_helpers.DEVICE)
    decay = launcher(("decay", True, True, str(g.dtype)[6:], str(beta.dtype)[6:]))
    decay(g, beta, inputs["A_log"], inputs["dt_bias"], cu, bounds, 3.0, steps)
    launcher(("reach", True))(cu, bounds, reaches, segment, section, steps, entered, reverse)

    step_size = 3 * torch.sigmoid(beta.double())
    log = -inputs["A_log"].double().exp() * F.softplus(g.double() + inputs["dt_bias"].double())
    log = log / math.log(2) + (1 - step_size).abs().clamp(min=1).log2()
    expected = torch.zeros_like(reaches)
    exact = torch.zeros_like(bounds)
    first = 0
    for n, length in enumerate(lengths):
        chunks = [log[i : min(i + 64, first + length)].sum(0) for i in range(first, first + length, 64)]
        base, per = first // 64 + n, segment // 64
        for i, chunk in enumerate(chunks):
            exact[base + i] = chunk
        parts = [chunks[i : i + per] for i in range(0, len(chunks), per)]
        for s, part in enumerate(parts):
            if s == (0 if reverse else len(parts) - 1):
                continue
            sums = torch.stack(part if reverse else part[::-1]).cumsum(0)
            found = (sums >= -BEYOND).sum(0) + 1  # sums descend
            opens = s == (len(parts) - 1 if reverse else 0)
            found = found.clamp(max=len(part) + (1 if entered or not opens else 0))
            places = range(0, len(part), section // 64)
            passed = 0
            for i in reversed(places) if not reverse else places:
                mine = min(section // 64, len(part) - i)
                expected[first // section + n + (s * segment) // section + i * 64 // section] = (found - passed).clamp(
                    0, mine + 1
                )
                passed += mine
        first += length
    written = exact != 0
    torch.testing.assert_close(bounds[written], exact[written], rtol=1e-4, atol=1e-2)
    assert (reaches >= 0).all() and reaches.unique().numel() >= min(5, section // 64 + 2)
    assert ((reaches - expected).abs() <= ((expected > 0) & (reaches > 0)).int()).all()  # one on the edge


def test_few_distinct_keys_through_segments():
    """Where the maps of the segments are hardest to stitch."""
    inputs = make_inputs(16384, key_heads=1, value_heads=2, keys="few", beta="half", g=-1e-5)
    check(inputs, "few keys, long")


@pytest.mark.parametrize("g", ["slow", -20.0])
def test_keys_that_are_not_normalised(g):
    check(make_inputs(1000, keys="long", beta="half", g=g))


def test_large_values():
    """Values and queries far from 1 scale what comes out, and change no digit count."""
    inputs = make_inputs(200)
    inputs["v"] *= 1e4
    inputs["initial_state"] *= 1e4
    inputs["q"] *= 1e-4
    check(inputs)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_scale(scale):
    check(make_inputs(130), scale=scale)
    check(raw_inputs(tokens=130), scale=scale, **ALL_OPTIONS)


# ---------------------------------------------------------------- options of the operator


@pytest.mark.parametrize("l2norm", [{}, L2NORM], ids=["", "l2norm"])
@pytest.mark.parametrize("gate", ["given", "A_log", "A_log and dt_bias"])
@pytest.mark.parametrize("beta", [{}, SIGMOID, DOUBLED], ids=["", "sigmoid", "doubled"])
def test_options(l2norm, gate, beta):
    """A from 0.05 to 16, by head."""
    inputs = make_inputs(1000, keys="raw" if l2norm else "random", beta_dtype=torch.bfloat16)
    options = l2norm | beta
    raw = with_raw_gates(inputs, decay=[0.05, 0.5, 3.0, 16.0], bias=gate != "A_log", sigmoid=bool(beta))
    if gate != "given":
        inputs, options = raw, options | GATE
    elif beta:
        inputs["beta"] = raw["beta"]
    check(inputs, alike=False, **options)


@pytest.mark.parametrize("beta_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32])
def test_dtypes_of_the_gates(gate_dtype, beta_dtype):
    check(raw_inputs(lengths=[70, 300], gate_dtype=gate_dtype, beta_dtype=beta_dtype), lengths=[70, 300], **ALL_OPTIONS)


def test_extreme_raw_gates():
    """Softplus and sigmoid where exp overflows, and where nothing is left of it."""
    inputs = raw_inputs(tokens=400, decay=0.05, gate_dtype=torch.float32, beta_dtype=torch.float32)
    values = torch.tensor([-100.0, -30.0, -5.0, 0.0, 5.0, 30.0, 100.0]).to(inputs["g"])
    inputs["g"][0, ::3] = values[torch.arange(134) % 7, None]
    inputs["beta"][0, 1::3] = values[torch.arange(133) % 7, None]
    check(inputs, alike=False, **ALL_OPTIONS)


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (96, 192)])
def test_float16(key_dim, value_dim, options):
    shape = {"key_dim": key_dim, "value_dim": value_dim, "dtype": torch.float16}
    if options:
        inputs = raw_inputs(lengths=MIX, beta_dtype=torch.float16, gate_dtype=torch.float16, **shape)
        for name in ("q", "k"):  # keys of length 1e-3 have gradients beyond float16
            inputs[name] = torch.randn_like(inputs[name])
    else:
        inputs = make_inputs(lengths=MIX, **shape)
    check(inputs, lengths=MIX, **options)


@pytest.mark.parametrize("g", [0.0, -1e-4, "mixed"])
def test_float16_decays(g):
    check(make_inputs(1000, g=g, beta=1.0, dtype=torch.float16), bars_of(1.0, g))


# ---------------------------------------------------------------- states and gradients asked for


def test_a_state_carried_over_is_the_whole_sequence():
    inputs = make_inputs(500, batch=2, g=-1e-3)
    expected = reference(inputs, make_cotangents(inputs, 2))
    state, parts = inputs["initial_state"], []
    for part in (slice(None, 190), slice(190, None)):
        here = {name: x[:, part] for name, x in inputs.items() if name != "initial_state"}
        o, state = run(here | {"initial_state": state}, output_final_state=True)
        parts.append(o)
    # g = -1e-3 and β up to 2 forget little in 500 tokens: rounding alone comes to 5.0e-3 and 4.5e-3
    expected = {name: expected[name] for name in ("o", "final_state")}
    judge({"o": torch.cat(parts, 1), "final_state": state}, expected, "no decay")


def test_without_gradients():
    inputs = raw_inputs(lengths=MIX)
    expected = reference(inputs, make_cotangents(inputs, len(MIX)), cu_seqlens=boundaries(MIX), **ALL_OPTIONS)
    expected = {name: expected[name] for name in ("o", "final_state")}
    for mode in (torch.no_grad, torch.inference_mode):
        poison_free_memory()
        with mode():
            o, final_state = run(inputs, cu_seqlens=boundaries(MIX), output_final_state=True, **ALL_OPTIONS)
        judge({"o": o, "final_state": final_state}, expected)
    o, final_state = run(inputs, cu_seqlens=boundaries(MIX), **ALL_OPTIONS)
    assert final_state is None
    judge({"o": o}, {"o": expected["o"]})


@pytest.mark.parametrize("used", ["o", "final_state"])
def test_a_loss_of_one_output(used):
    inputs = make_inputs(lengths=MIX)
    cotangents = make_cotangents(inputs, len(MIX))
    cotangents = {name: x if name == used else torch.zeros_like(x) for name, x in cotangents.items()}
    expected = reference(inputs, cotangents, cu_seqlens=boundaries(MIX))
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    poison_free_memory()
    o, final_state = run(leaves, output_final_state=used == "final_state", cu_seqlens=boundaries(MIX))
    output = {"o": o, "final_state": final_state}[used]
    poison_free_memory()
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangents[used], materialize_grads=True)
    got = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    judge(got, {name: expected[name] for name in got}, sizes=natural_sizes(inputs, expected, True))


@pytest.mark.parametrize(
    "names", [["q"], ["v"], ["beta"], ["g"], ["A_log"], ["initial_state"], ["k", "dt_bias"]], ids="-".join
)
def test_a_subset_of_the_gradients(names):
    inputs = raw_inputs(tokens=200)
    cotangents = make_cotangents(inputs, 1)
    expected = evaluate(inputs, cotangents, **ALL_OPTIONS)
    leaves = {name: x.clone().requires_grad_(name in names) for name, x in inputs.items()}
    o, final_state = run(leaves, output_final_state=True, **ALL_OPTIONS)
    torch.autograd.backward([o, final_state], [cotangents["o"], cotangents["final_state"]])
    for name, x in leaves.items():
        assert (x.grad is not None) == (name in names)
        if name in names:
            assert_same_bits({name: x.grad}, {name: expected[f"d{name}"]})


def test_inputs_are_left_as_they_were():
    inputs = raw_inputs(lengths=MIX)
    before = {name: x.clone() for name, x in inputs.items()}
    cotangents = make_cotangents(inputs, len(MIX))
    cotangents_before = {name: x.clone() for name, x in cotangents.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, final_state = run(leaves, cu_seqlens=boundaries(MIX), output_final_state=True, **ALL_OPTIONS)
    torch.autograd.backward([o, final_state], [cotangents["o"], cotangents["final_state"]])
    assert_same_bits(leaves, before)
    assert_same_bits(cotangents, cotangents_before)


def test_autocast_changes_nothing():
    inputs = raw_inputs(tokens=130)
    cotangents = make_cotangents(inputs, 1)
    expected = evaluate(inputs, cotangents, **ALL_OPTIONS)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    with torch.autocast(hopper_helpers.DEVICE, torch.bfloat16):
        o, final_state = run(leaves, output_final_state=True, **ALL_OPTIONS)
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), list(cotangents.values()))
    assert_same_bits(results(o, final_state, leaves, gradients), expected)
