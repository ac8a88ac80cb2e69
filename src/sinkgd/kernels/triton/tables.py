"""Tables of int64 on the device, copied there without waiting and kept while they are in use."""

from array import array
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

# Tables of addresses change where gradients are freed after each step; few sets of them recur.
KEPT = 1024


class _Copy(NamedTuple):
    there: Tensor
    host: Tensor  # what a graph that holds the copy reads, at every replay


class Tables:
    """Copies of tables by their content, on the stream that reads them."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[Hashable, ...], _Copy] = OrderedDict()
        # A graph reads its tables at every replay, and nobody says when it is gone.
        self._captured: list[_Copy] = []

    def addresses(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """Return ``values`` on ``device``."""
        key = values, *_stream(device)
        found = self._find(key, device)
        return (
            self._copy(key, torch.frombuffer(array("q", values), dtype=torch.int64), device)
            if found is None
            else found
        )

    def table(self, host: Tensor, device: torch.device) -> Tensor:
        """Return a copy of ``host``, which does not change, on ``device``."""
        key = id(host), *_stream(device)  # it is kept beside the copy, so no other has its id
        found = self._find(key, device)
        return self._copy(key, host, device) if found is None else found

    def _find(self, key: tuple[Hashable, ...], device: torch.device) -> Tensor | None:
        # A copy that was captured is filled by the replay of its graph, so no other may read it.
        copy = self._recent.get(key)
        if copy is None:
            return self._from_before(key) if capturing(device) else None
        self._recent.move_to_end(key)
        if capturing(device):
            self._captured.append(copy)
        return copy.there

    def _from_before(self, key: tuple[Hashable, ...]) -> Tensor | None:
        """Return a copy that another stream made before the capture, which waited for it."""
        for (*content, _), copy in self._recent.items():
            if content == [*key[:-1]]:
                self._captured.append(copy)
                return copy.there
        return None

    def _copy(self, key: tuple[Hashable, ...], host: Tensor, device: torch.device) -> Tensor:
        # While a graph is captured no pinned memory may be allocated, and none is needed:
        # https://github.com/pytorch/pytorch/pull/146924,
        # https://github.com/pytorch/pytorch/pull/166765
        pins = device.type != "cpu" and not capturing(device)
        source = torch.empty_like(host, pin_memory=True).copy_(host) if pins else host
        there = source.to(device, non_blocking=True)
        if capturing(device):
            self._captured.append(_Copy(there, host))
        else:
            self._recent[key] = _Copy(there, host)
            if len(self._recent) > KEPT:
                self._recent.popitem(last=False)
        return there


def capturing(device: torch.device) -> bool:
    """Whether what is done on ``device`` goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> tuple[torch.device, int]:
    # Another stream does not know when a copy has arrived.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream
