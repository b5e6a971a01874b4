from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile

from qlakernels.ranges import named_range


def test_nothing_unless_a_profiler_records(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    assert isinstance(named_range("a name"), nullcontext)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, named_range("a name"):
        torch.ones(3).sum()
    (event,) = [event for event in recorded.events() if event.name == "a name"]
    assert {child.name for child in event.cpu_children} >= {"aten::sum"}
    assert isinstance(named_range("a name"), nullcontext)


def test_inside_torch_compile():
    def function(x):
        with named_range("a name"):
            return (x + 1).relu()

    x = torch.arange(-3.0, 3.0)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))
