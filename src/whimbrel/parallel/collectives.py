"""Sums and gathers between ranks through which gradients flow back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = distributed.get_world_size(group)
        whole = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
        return whole.unflatten(0, (ranks, x.shape[0]))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        whole = gradients[0].contiguous()
        own = torch.empty_like(whole[0])
        distributed.reduce_scatter_tensor(own, whole.flatten(0, 1), group=ctx.group)
        return own, None


def copy(x: Tensor, group: ProcessGroup) -> Tensor:
    """The same on every rank of the group, which then does different things with it: gradients are summed."""
    return _Copy.apply(x, group)


def add(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the group, on every rank. What follows is the same everywhere, so its gradient is each part's."""
    return _Add.apply(x, group)


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """[n, ...] of each rank -> [ranks, n, ...] on every rank; gradients go back to where the part came from, summed."""
    return _Gather.apply(x, group)
