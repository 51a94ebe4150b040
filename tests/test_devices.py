"""Work goes to the device of its tensors, whichever is current: with a fake torch.cuda."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fork_attn.devices import current
from fork_attn.staging import Staging


def test_only_a_cuda_device_becomes_current(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []

    def scope(device: torch.device) -> nullcontext[None]:
        made.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", scope)
    for device in ("cpu", "meta", "cuda:1"):
        with current(torch.device(device)):
            pass
    assert made == [torch.device("cuda:1")]


def test_an_upload_ends_on_the_stream_of_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current stream of the current device may be another one's."""
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = "the current device's") -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    staging = Staging(torch.device("cpu"))
    staging.buffer(16).fill_(3)
    staging._on_gpu = True  # of what `buffer` has made
    target = torch.zeros(16, dtype=torch.uint8)
    staging.send(16, target)
    assert target.eq(3).all()
    assert recorded == [("stream of", target.device)]
