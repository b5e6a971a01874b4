"""Gradients of the gated delta rule on the Hopper kernels against the torch backend in float64, then the time of G.

    python benchmarks/check_gradients.py [--repeats 20]

Needs an H100, torch and qlakernels. Errors are relative, of the worst head; the bars are those of sound bfloat16
kernels on these inputs. The backward is run three times: its results must have the same bits.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels")]

import torch  # noqa: E402

from qlakernels import chunk_gated_delta_rule  # noqa: E402
from qlakernels.gated_delta_rule.hopper import kernels, operator  # noqa: E402
from qlakernels.gated_delta_rule.hopper.common import CHUNK, STATE_STRIDE  # noqa: E402
from qlakernels.gated_delta_rule.hopper.gradients import PART, value_parts  # noqa: E402

BARS = {"q": 6e-3, "k": 6e-3, "v": 6e-3, "g": 1.2e-2, "beta": 8e-3, "initial_state": 6e-3}
CASES = {  # rows, tokens or lengths, key heads, value heads, K, V, smallest g, dtype
    "dense 2x320 2/4": (2, 320, 2, 4, 128, 128, -0.1, torch.bfloat16),
    "packed 2/4": (1, [70, 0, 1, 200, 257], 2, 4, 128, 128, -0.1, torch.bfloat16),
    "packed, strong decay 1/3": (1, [600, 63, 64, 65, 256, 1], 1, 3, 128, 128, -20.0, torch.bfloat16),
    "dense 1x4096 1/2": (1, 4096, 1, 2, 128, 128, -0.1, torch.bfloat16),
    "packed 64/64 2/4": (1, [300, 257, 1], 2, 4, 64, 64, -0.1, torch.bfloat16),
    "packed 96/192 2/4": (1, [300, 257, 1], 2, 4, 96, 192, -0.1, torch.bfloat16),
    "packed 128/256 1/2": (1, [300, 257, 1], 1, 2, 128, 256, -0.1, torch.bfloat16),
    "dense 8x2048 16/32": (8, 2048, 16, 32, 128, 128, -0.1, torch.bfloat16),
    "float16 packed 2/4": (1, [300, 257, 1], 2, 4, 128, 128, -0.1, torch.float16),
}


def inputs(rows, tokens, groups, heads, key_dim, value_dim, decay, dtype):
    lengths = tokens if isinstance(tokens, list) else None
    tokens = sum(lengths) if lengths else tokens
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    x = {name: normal(rows, tokens, groups, key_dim) for name in "qk"}
    x["v"] = normal(rows, tokens, heads, value_dim)
    x = {name: y.to(dtype) for name, y in x.items()}
    x["g"] = decay * torch.rand(rows, tokens, heads, generator=generator)
    x["beta"] = torch.rand(rows, tokens, heads, generator=generator)
    x["beta"][:, ::37], x["beta"][:, 5::41] = 0.0, 1e-9  # the tiny ones, whose dv is repaired
    x["initial_state"] = 0.3 * normal(len(lengths) if lengths else rows, heads, key_dim, value_dim)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) if lengths else None
    return x, normal(rows, tokens, heads, value_dim).to(dtype), bounds


def gradients(x, do, bounds, backend):
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    o, state = chunk_gated_delta_rule(
        **leaves, cu_seqlens=bounds, output_final_state=True, use_qk_l2norm_in_kernel=True, backend=backend
    )
    loss = (o * do).sum() + 0.1 * state.sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def worst(got, want, axis):
    got, want = (y.double().movedim(axis, 0).flatten(1) for y in (got, want))
    return ((got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-300)).max().item()


def check(name, case):
    x, do, bounds = inputs(*case)
    x, do = {n: y.cuda() for n, y in x.items()}, do.cuda()
    want = gradients({n: y.double() for n, y in x.items()}, do.double(), bounds, "torch")
    bounds = None if bounds is None else bounds.cuda()
    runs = [gradients(x, do, bounds, "tilelang") for _ in range(3)]
    errors = {n: worst(runs[0][n], want[n], 1 if n == "initial_state" else 2) for n in want}
    same = all(torch.equal(run[n], runs[0][n]) for run in runs for n in want)
    bad = [n for n, error in errors.items() if not error < BARS[n]] + ([] if same else ["bits"])
    print(f"{name:26s}", " ".join(f"d{n} {error:.1e}" for n, error in errors.items()), bad or "ok", flush=True)


def time_kernel(rows, tokens, groups, heads, dim, repeats):
    total, workers = rows * tokens, torch.cuda.get_device_properties(0).multi_processor_count
    slots, kept, steps = operator._sizes(total, rows)

    def new(*shape, dtype=torch.bfloat16):
        return 0.1 * torch.randn(*shape, device="cuda", dtype=dtype)

    q, k, do, W, dv = (new(total, n, dim) for n in (groups, groups, heads, heads, heads))
    states, d_states = (new(n, heads, dim, dim) for n in (kept, slots))
    gates, norms = (new(slots, n, 2, CHUNK, dtype=torch.float32).abs() + 0.01 for n in (heads, groups))
    gates[:, :, 0] = -gates[:, :, 0].cumsum(-1)
    scratch = new(workers, heads // groups, value_parts(dim) * PART, dim)
    out = [torch.empty_like(q), torch.empty_like(k), *(new(total, heads, dtype=torch.float32) for _ in range(2))]
    cu = operator.dense_boundaries(rows, tokens, q.device)
    run = kernels.kernel(("gradients", dim, dim, "bfloat16", True))
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # the launch must not be waited for
        start.record()
        run(q, k, do, W, dv, states, d_states, gates, norms, cu, scratch, *out, 1.0, steps, heads // groups, workers)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    median = sorted(times[3:])[repeats // 2]
    moved = total * heads * dim * 2 * (3 + dim / CHUNK + dim / STATE_STRIDE) + total * groups * dim * 2 * 4
    print(f"G {rows}x{tokens} {groups}/{heads}: {median:.3f} ms, {moved / 1e9:.2f} GB, {moved / median / 1e9:.2f} TB/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    for name, case in CASES.items():
        check(name, case)
    for shape in ((8, 4096, 16, 32, 128), (8, 4096, 16, 16, 128), (1, 32768, 16, 32, 128)):
        time_kernel(*shape, repeats)


if __name__ == "__main__":
    main()
