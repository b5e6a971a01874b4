"""A forward and its backward as they are checked and timed: the same functions for both, so what is timed is right.

`forward` is that of inference: nothing is kept. `train_forward` keeps what `backward` needs, once.
"""

from collections.abc import Callable

import torch

from qlatrain.bench.operators import Problem

Steps = tuple[Callable[[], object] | None, Callable[[], object]]
"""(what has to come before, untimed; what is timed)"""


class EagerRun:
    """The calls as a training script makes them."""

    def __init__(self, problem: Problem, backend: str):
        self._problem, self._backend = problem, backend
        self._o: torch.Tensor | None = None

    def forward(self) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"o": self._problem.call(self._backend)}

    def train_forward(self) -> torch.Tensor:
        self._o = self._problem.call(self._backend)
        return self._o

    def backward(self) -> dict[str, torch.Tensor]:
        """Output and gradients of the last `train_forward`, which it uses up."""
        o, self._o = self._o, None
        leaves = self._problem.leaves
        gradients = torch.autograd.grad(o, list(leaves.values()), self._problem.cotangent)
        return {"o": o.detach()} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}

    def both(self) -> dict[str, torch.Tensor]:
        self.train_forward()
        return self.backward()

    def results(self, direction: str) -> dict[str, torch.Tensor]:
        """What a direction gives, for the check: `o`, and `dNAME` for every input unless it is the forward alone."""
        return self.forward() if direction == "forward" else self.both()

    def steps(self, direction: str) -> Steps:
        return {
            "forward": (None, self.forward),
            "backward": (self.train_forward, self.backward),
            "forward+backward": (None, self.both),
        }[direction]


class ReplayedRun:
    """One direction, captured into CUDA graphs and replayed: the kernels alone, without the time of the host.

    Raises:
        RuntimeError: the calls cannot be captured, for example because they wait for the device.
    """

    WARM_UPS = 3  # before a capture, as torch.cuda.graphs asks for

    def __init__(self, eager: EagerRun, direction: str):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UPS):
                eager.results(direction)
        torch.cuda.current_stream().wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # the graphs write into these at each replay
        if direction == "forward":
            with torch.cuda.graph(self._forward, stream=stream):
                self._results = eager.forward()
        else:
            with torch.cuda.graph(self._forward, stream=stream):
                eager.train_forward()
            with torch.cuda.graph(self._backward, stream=stream, pool=self._forward.pool()):
                self._results = eager.backward()

    def results(self, direction: str) -> dict[str, torch.Tensor]:
        """What a replay writes; filled with NaN before, so that a graph that leaves something out is found out."""
        for tensor in self._results.values():
            tensor.fill_(float("nan"))
        before, timed = self.steps(direction)
        if before is not None:
            before()
        timed()
        return self._results

    def _both(self) -> None:
        self._forward.replay()
        self._backward.replay()

    def steps(self, direction: str) -> Steps:
        return {
            "forward": (None, self._forward.replay),
            "backward": (self._forward.replay, self._backward.replay),
            "forward+backward": (None, self._both),
        }[direction]
