"""Builds the Hopper kernels without a GPU, into the cache where the process that needs them looks.

    python -m qlakernels.precompile --arch sm_90a [--heads 128/128 96/192] [--dtype bfloat16] [--gate] [--layers]
        [--hidden 2048]

With --gate, --layers and --hidden it is what a model needs to train: the rule with its gates inside, the kernels beside
it, and the norms of its residual stream.

The cache is TILELANG_CACHE_DIR (by default ~/.tilelang/cache); copy it to the machine with the GPU.
"""

import argparse
import sys

from qlakernels import compiled
from qlakernels.gated_delta_rule.api import KEY_DIMS, VALUE_DIMS
from qlakernels.residual_norm.api import refuses_width


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qlakernels.precompile", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a", help="only sm_90a (H100, H200) has kernels so far")
    parser.add_argument("--heads", nargs="*", default=["128/128"], metavar="K/V", help="head sizes, or all")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"], choices=["bfloat16", "float16"])
    parser.add_argument("--gate", action="store_true", help="also with the gate and β's sigmoid inside the operator")
    parser.add_argument("--layers", action="store_true", help="also convolution, gated norm, SwiGLU, loss and AdamW")
    parser.add_argument("--hidden", nargs="*", type=int, default=[], metavar="D", help="also residual norms, this wide")
    arguments = parser.parse_args()
    if arguments.arch != "sm_90a":
        sys.exit(f"error: --arch {arguments.arch} has no kernels: use sm_90a")
    needed = []
    for key_dim, value_dim in head_sizes(arguments.heads):
        for dtype in arguments.dtype:
            gates = [(False, "float32")]
            if arguments.gate:
                gates += [(True, raw) for raw in (dtype, "float32")]
            for inside, raw in gates:
                for keep in (False, True):
                    needed += of_the_rule(key_dim, value_dim, dtype, inside, raw, keep)
    if arguments.layers:
        needed += beside_the_rule(arguments.dtype, {value_dim for _, value_dim in head_sizes(arguments.heads)})
    for hidden in arguments.hidden:
        if reason := refuses_width(hidden):
            sys.exit(f"error: --hidden {hidden}: the residual norm {reason}")
        for dtype in arguments.dtype:
            needed += of_the_residual(hidden, dtype)
    compiled.load(needed)
    print(f"{len(set(needed))} kernels are in the cache")


def of_the_rule(key_dim: int, value_dim: int, dtype: str, gate: bool, raw_dtype: str, keep: bool) -> list[tuple]:
    """With normalised queries and keys, and `gate` the decay and step size made inside of what has `raw_dtype`; for
    rows of any length."""
    from qlakernels.gated_delta_rule.hopper.kernels import specialisations

    call = key_dim, value_dim, dtype, True, gate, gate, raw_dtype, raw_dtype, keep
    long, short = specialisations(*call, cut=True), specialisations(*call, part=64)  # with few heads
    return [*long.values(), *short.values()]


def of_a_model(key_dim: int, value_dim: int, hidden: int, dtype: str) -> list[tuple]:
    """What the training of a model takes whose mixers are `gated_delta_net`, over float32 weights."""
    needed = of_the_rule(key_dim, value_dim, dtype, True, dtype, True) + beside_the_rule([dtype], {value_dim})
    return needed if refuses_width(hidden) else needed + of_the_residual(hidden, dtype)


def of_the_residual(hidden: int, dtype: str) -> list[tuple]:
    """The norms of a residual stream, the first without a delta, over float32 weights: in front of products, which have
    the normed rows made again, and of what keeps them."""
    from qlakernels.residual_norm.hopper.kernels import specialisations

    needed = []
    for delta in (False, True):
        for with_normed in (False, True):
            needed += specialisations(hidden, dtype, "float32", delta, True, with_normed).values()
    return list(dict.fromkeys(needed))


def beside_the_rule(dtypes: list[str], value_dims: set[int]) -> list[tuple]:
    """What layers and optimizer take in training besides, over float32 weights: four taps, positions in int64."""
    from qlakernels.adamw.hopper.kernels import specialisation as adamw
    from qlakernels.cross_entropy.hopper import kernels as cross_entropy
    from qlakernels.norm.hopper import kernels as norm
    from qlakernels.short_conv.hopper import kernels as short_conv
    from qlakernels.swiglu.hopper import kernels as swiglu

    needed = []
    for dtype in dtypes:
        needed += short_conv.specialisations(4, dtype, "float32", "int64", True, True).values()
        for value_dim in sorted(value_dims):
            for with_output in (False, True):
                needed += norm.specialisations(value_dim, dtype, "float32", True, with_output).values()
        needed += [(name, dtype) for name in (*swiglu.MAKERS, *cross_entropy.MAKERS)]
        needed += [adamw(dtype), adamw(dtype, dtype)]
    return needed


def head_sizes(names: list[str]) -> list[tuple[int, int]]:
    """`128/128` and the like, or `all`; ends the program with a sentence for what is not supported."""
    if names == ["all"]:
        return [(k, v) for k in KEY_DIMS for v in VALUE_DIMS]
    sizes = []
    for name in names:
        try:
            key_dim, value_dim = map(int, name.split("/"))
        except ValueError:
            sys.exit(f"error: --heads {name} is not K/V, such as 128/128")
        if key_dim not in KEY_DIMS or value_dim not in VALUE_DIMS:
            sys.exit(f"error: --heads {name}: K must be one of {KEY_DIMS} and V one of {VALUE_DIMS}")
        sizes.append((key_dim, value_dim))
    return sizes


if __name__ == "__main__":
    main()
