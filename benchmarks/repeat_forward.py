"""Runs the Hopper forward again and again on one input and says where its results differ. Needs an H100.

    python benchmarks/repeat_forward.py [--rows 8] [--tokens 4096] [--repeats 50]

For the open fault of docs/kernels.md: which chunks, heads and columns of o differ, and whether W, the kept states and
the final state differ with them.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import qlakernels.gated_delta_rule.hopper.operator  # noqa: E402, F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    rows, tokens, groups, heads, dim = arguments.rows, arguments.tokens, 16, 32, 128
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(rows, tokens, groups, dim, device="cuda"), dim=-1).bfloat16() for _ in range(2))
    v = torch.randn(rows, tokens, heads, dim, device="cuda").bfloat16()
    g = -0.05 * torch.rand(rows, tokens, heads, device="cuda")
    beta = torch.rand(rows, tokens, heads, device="cuda")

    for keep in (False, True):

        def forward(keep=keep):
            options = (None, None, None, None, dim**-0.5, True, True, False, False, False, keep)
            return torch.ops.qlakernels.gated_delta_rule(q, k, v, g, beta, *options)

        first, found = forward(), []
        for _ in range(arguments.repeats):
            again = forward()
            differ = [not torch.equal(a, b) for a, b in zip(first, again, strict=True)]
            if any(differ):
                places = (first[0] != again[0]).view(rows, tokens // 64, 64, heads, 2, dim // 2).any(5).any(2)
                found.append((differ, [tuple(place) for place in places.nonzero().tolist()[:4]]))
        print(f"keep={keep}: {len(found)} of {arguments.repeats} differ from the first")
        for differ, places in found[:5]:
            print(f"  (o, final state, W, kept states, order) differ {differ}")
            print(f"  first at (row, chunk, head, half of V) {places}")


if __name__ == "__main__":
    main()
