"""Bytes of live tensors: what counts, since when, until when."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cogview_pl.memory.trace import LiveBytes

MEGABYTE = 2**20


@pytest.mark.parametrize("fake", [False, True])
def test_memory_counts_while_it_is_used_and_once(fake: bool) -> None:
    with FakeTensorMode() if fake else nullcontext(), LiveBytes() as live:
        one = torch.zeros(MEGABYTE, dtype=torch.uint8)
        view = one[10:]
        assert live.total == MEGABYTE
        del one
        assert live.total == MEGABYTE  # the view holds it
        with live.label("more"):
            more = view.float()
        assert live.now["more"] == 4 * (MEGABYTE - 10)
        del more, view
        assert live.total == 0
        assert live.highest == MEGABYTE + 4 * (MEGABYTE - 10)
        assert live.restart()["more"] == 4 * (MEGABYTE - 10)
        assert live.highest == 0


def test_what_was_there_before_counts_only_on_request() -> None:
    before = torch.zeros(MEGABYTE, dtype=torch.uint8)
    with LiveBytes() as live:
        before.add_(1)
        assert live.total == 0
    with LiveBytes(given=True) as live:
        before.add_(1)
        before.add_(1)
        assert live.total == MEGABYTE


def test_gradients_get_their_own_label() -> None:
    weight = torch.nn.Parameter(torch.ones(256, 256))
    with LiveBytes() as live:
        weight.register_post_accumulate_grad_hook(lambda p: live.claim(p.grad, "gradients"))
        (torch.ones(8, 256) @ weight).sum().backward()
        assert live.now["gradients"] == 4 * 256**2
        weight.grad = None
        assert live.now["gradients"] == 0
