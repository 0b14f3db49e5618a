"""Copies of parameters: their gradients are added up over the processes that have seen different tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from swift.parallel.gradients import local

BUCKET_BYTES = 25 * 2**20


class Replicas:
    """Parameters that every process of ``group`` holds alike, in buckets. Their gradients are sums, never means.

    The buckets go out in one fixed order, the last layers first, each as soon as its gradients are there: while the backward
    pass goes on (``expect``), or when it is over (``finish``). Nothing depends on which parameters a process has used.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Any, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.group = group
        self.buckets = _buckets(parameters, bucket_bytes)
        self.parameters = [parameter for bucket in self.buckets for parameter in bucket]
        self._place = {parameter: index for index, bucket in enumerate(self.buckets) for parameter in bucket}
        self._is_expecting = False
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, Any]] = []
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._is_ready)

    def expect(self) -> None:
        """The backward pass that begins now is the last one of the step."""
        self._is_expecting = True
        self._missing = [len(bucket) for bucket in self.buckets]
        self._seen: set[nn.Parameter] = set()

    def finish(self) -> None:
        """All gradients are there: send what was not sent yet, and put every sum into its place.

        A parameter that no process has a gradient of keeps none.
        """
        self._is_expecting = False
        if not self.parameters:
            return
        while len(self._sent) < len(self.buckets):
            self._send()
        # After the buckets, of which others may have sent more by now: in one group all send in one order.
        used = torch.tensor([float(parameter.grad is not None) for parameter in self.parameters], device=self.parameters[0].device)
        dist.all_reduce(used, group=self.group)
        is_used = dict(zip(self.parameters, used.tolist(), strict=True))
        for bucket, (flat, work) in zip(self.buckets, self._sent, strict=True):
            work.wait()
            for parameter, total in zip(bucket, flat.split([local(each).numel() for each in bucket]), strict=True):
                if not is_used[parameter]:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                mine = local(parameter.grad)
                mine.copy_(total.view_as(mine))
        self._sent = []

    def _is_ready(self, parameter: Tensor) -> None:
        if not self._is_expecting or parameter in self._seen:
            return
        assert isinstance(parameter, nn.Parameter)
        self._seen.add(parameter)
        self._missing[self._place[parameter]] -= 1
        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._sent)]
        own = [(torch.zeros_like(local(each)) if each.grad is None else local(each.grad)).reshape(-1) for each in bucket]
        flat = torch.cat(own)
        self._sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))


def _buckets(parameters: Sequence[nn.Parameter], most_bytes: int) -> list[list[nn.Parameter]]:
    """``parameters`` from the last to the first, in lists of one precision of at most ``most_bytes``, or of one parameter."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        own = local(parameter).numel() * parameter.element_size()
        if not buckets or size + own > most_bytes or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += own
    return buckets
