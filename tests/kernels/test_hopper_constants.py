"""Constants across streams and CUDA graphs, with streams that only write down what is asked of them."""

import torch

from qlakernels.gated_delta_rule.hopper import constants
from qlakernels.gated_delta_rule.hopper.constants import MOST, constant

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self):
        self.waited = []

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waited.append(event)


class Tensor:
    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


def make(n, device):
    return (Tensor(),)


def test_streams_and_graphs(monkeypatch):
    monkeypatch.setattr(constants, "_made", {})
    monkeypatch.setattr(constants, "_in_graphs", {})
    first, second = Stream(), Stream()

    def on(stream, capturing=False):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    on(first)
    made = constant(make, 1, device=DEVICE)
    assert constant(make, 1, device=DEVICE) is made and not first.waited
    on(second)
    assert constant(make, 1, device=DEVICE) is made
    assert second.waited == [first] and made[0].streams == [second]
    on(second, capturing=True)
    assert constant(make, 1, device=DEVICE) is made and second.waited == [first]
    of_a_graph = constant(make, 2, device=DEVICE)
    on(second)
    assert constant(make, 2, device=DEVICE) is not of_a_graph
    for n in range(3, MOST + 3):
        constant(make, n, device=DEVICE)
    assert len(constants._made) == MOST
    assert constant(make, 1, device=DEVICE) is not made and made in constants._in_graphs.values()


def test_equal_rows():
    cu_seqlens, order = constant(constants.equal_rows, 3, 70, device=torch.device("cpu"))
    assert cu_seqlens.tolist() == [0, 70, 140, 210] and order.tolist() == [0, 1, 2]
    assert cu_seqlens.dtype == order.dtype == torch.int32
