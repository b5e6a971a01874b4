"""What a compiled kernel takes of a multiprocessor: registers, spills, shared memory, code. Needs nvcc, no GPU.

python -m qlakernels.gated_delta_rule.hopper.resources [K/V ...]        prints the table of docs/kernels.md
"""

import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tilelang

from qlakernels.compiled import load, maker_of
from qlakernels.compiling import kernel
from qlakernels.gated_delta_rule.hopper.kernels import IN_SEGMENTS, specialisations

# Bytes of a thread's registers that the compiler may put into memory, per kernel.
SPILL_LIMITS = {"boundaries": 0, "forward": 100, "reverse": 100, "gradients": 110, "gate_gradients": 0}
SPILL_LIMITS |= dict.fromkeys(("decay", "reach", *IN_SEGMENTS), 0)
SPILL_LIMITS |= dict.fromkeys(("forward, 64 rows", "reverse, 64 rows"), 100)
# Kilobytes of code, of the kernels that wait for it: what runs in their loops has to fit an instruction cache of 32 KB,
# which about half of a scan's code does. See docs/kernels.md.
CODE_LIMITS = {"forward": 66, "reverse": 66, "gradients": 100} | {f"{x}, 64 rows": 66 for x in ("forward", "reverse")}
NVCC = ["nvcc", "--cubin", "-O3", "-std=c++20", "-arch=sm_90a", "-Xptxas", "-v"]


@dataclass(frozen=True)
class Resources:
    registers: int  # of a thread at the start; a warpgroup may be given more of another's
    spilled: int  # bytes written, a thread
    shared: int  # bytes a block, static and dynamic
    code: int  # bytes


def resources(key: tuple) -> Resources:
    """Of the kernel of a specialisation, as ptxas reports them for sm_90a.

    Raises:
        RuntimeError: nvcc refused the source.
    """
    compiled = kernel(key)
    options = ["--use_fast_math"] if maker_of(key).pass_configs.get("tl.enable_fast_math") else []
    home = Path(tilelang.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(compiled.get_kernel_source())
        done = subprocess.run(
            [
                *NVCC,
                *options,
                f"-I{home / 'src'}",
                f"-I{home / '3rdparty/cutlass/include'}",
                "-o",
                f"{folder}/cubin",
                source,
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"nvcc could not compile {key}: {done.stderr.strip().splitlines()[-1]}")
        code = _code_of((Path(folder) / "cubin").read_bytes())
    dynamic = 0
    if "extern __shared__" in compiled.get_kernel_source():  # the last argument of the launch
        dynamic = int(re.findall(r"v_int64\) = \(\(int64_t\)(\d+)\)", compiled.get_host_source())[-1])
    return Resources(
        registers=_number(r"Used (\d+) registers", done.stderr),
        spilled=_number(r"(\d+) bytes spill stores", done.stderr),
        shared=dynamic + _number(r"(\d+) bytes smem", done.stderr),
        code=code,
    )


def _number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    return int(found[1]) if found else 0


def _code_of(cubin: bytes) -> int:
    """Bytes of machine code in an ELF file of 64 bits: its sections of instructions (SHT_PROGBITS, SHF_EXECINSTR)."""
    (table,), (entry, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = (struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count))
    return sum(size for _, kind, flags, _, _, size in sections if kind == 1 and flags & 4)


def training_kernels(key_dim: int, value_dim: int) -> dict[str, tuple]:
    """The specialisations of a model in bfloat16 with its gates in the operator, forward and backward, by name."""
    call = key_dim, value_dim, "bfloat16", True, True, True, "bfloat16", "bfloat16", True
    of_few_scans = specialisations(*call, part=64)
    return specialisations(*call, cut=True) | {
        f"{name}, 64 rows": of_few_scans[name] for name in ("forward", "reverse")
    }


def main() -> None:
    sizes = [tuple(map(int, size.split("/"))) for size in sys.argv[1:] or ["128/128", "64/64", "96/192"]]
    load([key for size in sizes for key in training_kernels(*size).values()])
    print("| K/V | kernel | registers | spilled bytes | shared KB | code KB |\n|---|---|---|---|---|---|")
    for size in sizes:
        for name, key in training_kernels(*size).items():
            found = resources(key)
            print(
                f"| {size[0]}/{size[1]} | {name} | {found.registers} | {found.spilled} | {found.shared / 1024:.1f} "
                f"| {found.code / 1024:.1f} |"
            )


if __name__ == "__main__":
    main()
