import time

import pytest
import torch

from qlatrain.bench.floors import Ceilings, Work
from qlatrain.bench.gated_delta_rule import GatedDeltaRule
from qlatrain.bench.shapes import parse_shape
from qlatrain.metrics.flops import gdn_operator_flops


def floor(ceilings, text: str, direction: str) -> tuple[float, str]:
    work = GatedDeltaRule.work(parse_shape(text), direction, 2)
    return 1e3 * ceilings.seconds(work), ceilings.bound(work)


def test_figures_by_hand(ceilings):
    """32,768 tokens of 32 value heads: bytes 520 + 512 / 2 forward, FLOPs 409,600 + 81,920 backward, each."""
    heads = 32768 * 32
    assert floor(ceilings, "8x4096 16/32", "forward") == (pytest.approx(1e3 * heads * 776 / 3e12), "memory")
    assert floor(ceilings, "1x32768 16/32", "backward") == (pytest.approx(1e3 * heads * 491_520 / 798e12), "compute")


@pytest.mark.parametrize("text", ["2x64 2/4", "1x64 3/3 96/192", "64 packed3 1/4 16/24"])
def test_forward_is_what_the_model_counts(text):
    shape = parse_shape(text)
    per_token = gdn_operator_flops(shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim)
    assert GatedDeltaRule.work(shape, "forward", 2).flops == shape.all_tokens * per_token


def test_both_directions_add_up():
    shape = parse_shape("2x64 2/6 32/48")
    forward, backward, both = (
        GatedDeltaRule.work(shape, direction, 4) for direction in ("forward", "backward", "forward+backward")
    )
    assert both == forward + backward == Work(forward.flops + backward.flops, forward.bytes + backward.bytes)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_the_tensors(dtype, size):
    shape = parse_shape("2x32 2/6 16/24")
    problem = GatedDeltaRule(shape, 0, dtype, torch.device("cpu"))
    inputs = sum(leaf.nbytes for leaf in problem.leaves.values())
    assert problem.work(shape, "forward", size).bytes == inputs + problem.cotangent.nbytes
    assert problem.work(shape, "backward", size).bytes == 2 * inputs + problem.cotangent.nbytes


def test_ceilings_of_this_machine():
    start = time.perf_counter()
    ceilings = Ceilings.measure(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - start < 20  # a second on a quiet machine
    assert 1e8 < ceilings.flops_per_second < 1e14 and 1e8 < ceilings.bytes_per_second < 1e13
    assert "matrix product" in ceilings.flops_how and "copy" in ceilings.bytes_how
