"""Where the time of a step goes, by family of kernels, from one step under the torch profiler.

On a GPU the time is the device's, from the first kernel of the step to the end of the last; on a CPU it is that of the
operators, each without those it calls. Every instant counts once. Where streams overlap, kernels that compute share it
equally, and communication has only what nothing else covers; `idle` is when nothing runs.

A kernel belongs to the family of the nearest operator or range around its launch that owns what is launched inside:
collectives, `optimizer` (clipping and the update), the gated delta rule, attention. In the backward, where no range is
open, a node belongs where the operator that made it does: autograd gives both one sequence number. Without an owner the
name of the kernel decides, as inside torch.compile. The convolutions, norms and gates beside the gated delta rule, the
cross entropy and copies are `norms_and_elementwise`.

The profiler slows the host, so `idle` is the most it can be, most of all where launches bound the step.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")

# family → how a person reads it
FAMILIES = {
    "gdn": "GDN",
    "attention": "attention",
    "matrix_products": "matrix products",
    "norms_and_elementwise": "norms and elementwise",
    "optimizer": "optimizer",
    "communication": "communication",
    "idle": "idle",
}
# Names of operators, ranges and kernels, the first that matches. Kernels of the gated delta rule, in this order: any
# library's by the operator, ours, FlashQLA's, FLA's.
_NAMES = {
    "communication": r"nccl|^c10d|^_c10d|^gloo:",
    "optimizer": r"^optimizer$|^Optimizer\.step#|multi_tensor_apply|_foreach_|fused_?adam|^adamw_update",
    # torch.compile's, with the names of all they fuse, and ours
    "norms_and_elementwise": r"^triton_(?!tem_)[a-z]{3}_|^(?:short_conv|gated_norm|swiglu)_(?:for|back)ward_kernel",
    "gdn": (
        r"gated_?delta(?!_?net)|delta_rule|gdn_gate"  # the whole mixer is a name for what its parts launch
        r"|^(?:boundaries|decay|reach|prepare|segments|stitch|forward|reverse|gradients|gate_gradients)_kernel(?:_\d+)?$"
        r"|^tilelang_"
        r"|chunk_(?:fwd|bwd)_kernel|(?:local|global)_cumsum|recompute_w_u|prepare_wy_repr|solve_tril|merge_16x16"
        r"|dot_kkt|l2norm_(?:fwd|bwd)|fused_beta_sigmoid"
    ),
    "attention": r"flash|fmha|sdpa|attn|attention|scaled_dot_product",
    "matrix_products": (
        r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitk|^triton_tem_"
        r"|^aten::_?(?:scaled_|grouped_|mkldnn_)?(?:mm|bmm|addmm|addbmm|baddbmm|mv|addmv|dot|matmul|linear)(?:_\w*)?$"
    ),
}
_PATTERNS = {family: re.compile(pattern, re.IGNORECASE) for family, pattern in _NAMES.items()}
_OWNERS = ("communication", "optimizer", "gdn", "attention")  # of all that is launched inside
_WAITS = re.compile(r"\w+ (?:Sync|Wait Event)$")  # which a trace shows on the device, as it does ranges
_CALLS = re.compile(r"cu(?:da)?[A-Z]")  # of the CUDA runtime and driver: numbered by themselves, not with operators
_SILENT = "6"  # of Kineto, which otherwise prints to standard error; 0 shows everything


@lru_cache(maxsize=4096)
def family_by_name(name: str) -> str | None:
    """The family that the name of an operator, a range or a kernel tells; None when it tells none."""
    return next((family for family, pattern in _PATTERNS.items() if pattern.search(name)), None)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a trace. Times in ns.

    lane: the thread of an operator, the stream of what ran on the device.
    is_range: a range somebody named, not an operator.
    id: of an operator. launched_by: of a kernel, the id of the operator it was launched in; 0 for none.
    sequence, forward_thread: a backward node has the sequence number of the operator that made it, and its thread;
        -1 and 0 where there are none.
    """

    name: str
    start: int
    end: int
    lane: int
    on_device: bool = False
    is_range: bool = False
    id: int = 0
    launched_by: int = 0
    sequence: int = -1
    forward_thread: int = 0


@dataclass(frozen=True)
class KernelTimes:
    """milliseconds: of each of `FAMILIES`."""

    milliseconds: dict[str, float]

    @property
    def step_milliseconds(self) -> float:
        return sum(self.milliseconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """Of each family, 0..1; they sum to 1."""
        return {family: ms / self.step_milliseconds for family, ms in self.milliseconds.items()}

    def row(self) -> dict[str, float]:
        """As in `metrics.jsonl`: `kernel_times/<family>`, `kernel_times/<family>_ms` and `kernel_times/step_ms`."""
        shares = {f"kernel_times/{family}": share for family, share in self.shares.items()}
        times = {f"kernel_times/{family}_ms": ms for family, ms in self.milliseconds.items()}
        return shares | times | {"kernel_times/step_ms": self.step_milliseconds}


class StepProfiler:
    """Profiles every `every`th step on the main process; 0: none.

    The result of a step is the same with and without: nothing random is drawn, and the operators are the same ones.
    """

    def __init__(self, every: int, device: torch.device, is_main: bool):
        self._every, self._is_main = every, is_main
        self._on_gpu = device.type == "cuda"
        if every and is_main:
            os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
            # CUPTI left attached slows every later step by a tenth or more (pytorch/pytorch#144455). It is detached
            # in the course of the next step, which must not be profiled then (pytorch/kineto#1554).
            os.environ.setdefault("TEARDOWN_CUPTI", "1" if every > 1 else "0")

    def due(self, step: int) -> bool:
        """Whether step `step` is profiled; the same on every process."""
        return self._every > 0 and step % self._every == 0

    def run(self, take_step: Callable[..., T], *arguments: object) -> tuple[T, KernelTimes | None]:
        """What `take_step(*arguments)` returns, and its times: None on other processes, and where nothing was seen.

        Waits for the device before and after.
        """
        if not self._is_main:
            return take_step(*arguments), None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._wait()
        with profile(activities=activities) as recorded:
            result = take_step(*arguments)
            self._wait()
        return result, kernel_times(_events(recorded), self._on_gpu)

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def _events(recorded: profile) -> list[Event]:
    """Operators and ranges, and the kernels, copies and fills of the device."""
    events = []
    for event in recorded.profiler.kineto_results.events():
        on_device, link = event.device_type() != DeviceType.CPU, event.linked_correlation_id()
        if on_device and (event.is_user_annotation() or _WAITS.match(event.name())):
            continue
        if not on_device and (link or _CALLS.match(event.name()) or event.start_thread_id() != event.end_thread_id()):
            continue
        events.append(
            Event(
                event.name(),
                event.start_ns(),
                event.end_ns(),
                event.device_resource_id() if on_device else event.start_thread_id(),
                on_device,
                event.is_user_annotation(),
                event.correlation_id(),
                link,
                event.sequence_nr(),
                event.fwd_thread_id(),
            )
        )
    return events


def kernel_times(events: Iterable[Event], on_gpu: bool) -> KernelTimes | None:
    """The times of a trace; None when nothing ran."""
    events = list(events)
    operators = [event for event in events if not event.on_device]
    owners = _owners(operators)
    if on_gpu:
        by_id = {event.id: event for event in operators}
        ran = [
            (event, _family_of_kernel(event.name, by_id.get(event.launched_by), owners))
            for event in events
            if event.on_device
        ]
    else:
        ran = [(event, _family_of_operator(event, owners)) for event in operators]
    spent = _shared_out([(event.start, event.end, event.lane, family) for event, family in ran])
    return KernelTimes({family: ns / 1e6 for family, ns in spent.items()}) if spent else None


def _owners(operators: list[Event]) -> dict[int, str | None]:
    """Id of an operator or a range → the family that owns what is launched in it, if one does.

    Of operators with one sequence number the last to begin made the node: the counter moves on with each node.
    """
    owners: dict[int, str | None] = {}
    around: dict[int, list[Event]] = {}  # by thread, the operators that are running
    made: dict[tuple[int, int], str | None] = {}  # by thread and sequence number
    for event in sorted(operators, key=lambda event: (event.start, event.id)):
        running = around.setdefault(event.lane, [])
        while running and running[-1].end <= event.start:
            running.pop()
        owner = family_by_name(event.name)
        if owner not in _OWNERS:
            owner = made.get((event.forward_thread, event.sequence)) if event.forward_thread else None
        if owner is None and running:
            owner = owners[running[-1].id]
        if event.sequence >= 0 and not event.forward_thread:
            made[event.lane, event.sequence] = owner
        owners[event.id] = owner
        running.append(event)
    return owners


def _family_of_kernel(name: str, operator: Event | None, owners: dict[int, str | None]) -> str:
    """Of a kernel that was launched in `operator`."""
    own = family_by_name(name)
    if own == "communication" or operator is None:
        return own or "norms_and_elementwise"
    return owners[operator.id] or own or family_by_name(operator.name) or "norms_and_elementwise"


def _family_of_operator(event: Event, owners: dict[int, str | None]) -> str:
    """Of the time in an operator itself. In a range, outside of operators, the host does no work of the step."""
    return "idle" if event.is_range else owners[event.id] or family_by_name(event.name) or "norms_and_elementwise"


def _shared_out(ran: list[tuple[int, int, int, str]]) -> dict[str, float]:
    """(start, end, lane, family) → ns by family, from the first start to the last end; {} of nothing.

    In a lane the last to begin is what runs: operators hold the ones they call.
    """
    ran = [item for item in ran if item[0] < item[1]]
    if not ran:
        return {}
    begins = [(start, True, i) for i, (start, _, _, _) in enumerate(ran)]
    ends = [(end, False, i) for i, (_, end, _, _) in enumerate(ran)]
    spent = dict.fromkeys(FAMILIES, 0.0)
    lanes: dict[int, list[int]] = {}
    before = min(begins)[0]
    for time, is_begin, i in sorted(begins + ends):  # at one instant what ends comes first
        if time > before:
            at_once = _computing([ran[running[-1]][3] for running in lanes.values() if running])
            for family in at_once:
                spent[family] += (time - before) / len(at_once)
            before = time
        running = lanes.setdefault(ran[i][2], [])
        running.append(i) if is_begin else running.remove(i)
    return spent


def _computing(families: list[str]) -> list[str]:
    """Of the families that run at one instant those that have it: computation before communication before nothing."""
    for waiting in ({"communication", "idle"}, {"idle"}):
        rest = [family for family in families if family not in waiting]
        if rest:
            return rest
    return ["idle"]
