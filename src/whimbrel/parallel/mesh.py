"""Which process does what: a grid of ranks with the axes data, fsdp, context, tensor; ranks of one tensor axis are
neighbours.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from whimbrel.errors import UserError
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig

T = TypeVar("T")
COPIES = ("data", "fsdp")
"""Axes whose ranks see different micro-batches."""
TOKENS = (*COPIES, "context")
"""Axes whose ranks see different tokens: what is summed over tokens is summed over these."""


@dataclass(frozen=True)
class Axes:
    """How many processes share the work, and in which way. Their product is the number of processes."""

    data: int = 1
    """Copies of the model, each with its part of a step's micro-batches."""
    fsdp: int = 1
    """The same, but each keeps only its part of weights, gradients and moments (FSDP2, arXiv 2304.11277)."""
    context: int = 1
    """Processes that share the tokens of a micro-batch; states, halos, keys and values are handed over."""
    tensor: int = 1
    """Processes that share every matrix (arXiv 1909.08053): heads, groups, feed-forward channels, vocabulary."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"train.parallel.{name} is {value}; set train.parallel.{name} to 1 or more")

    @property
    def processes(self) -> int:
        """All ranks."""
        return math.prod(asdict(self).values())

    @property
    def copies(self) -> int:
        """Ranks among which micro-batches are dealt."""
        return self.data * self.fsdp

    def check_batches(self, accumulate: int) -> None:
        """Raise `UserError` unless a step's micro-batches can be dealt out evenly."""
        if accumulate % self.copies:
            works = -(-accumulate // self.copies) * self.copies
            raise UserError(
                f"train.accumulate is {accumulate}, but {self.copies} copies (train.parallel data {self.data} × fsdp "
                f"{self.fsdp}) share a step's micro-batches; set train.accumulate to {works}"
            )

    def check_model(self, config: ModelConfig) -> None:
        """Raise `UserError` unless the axis `tensor` divides what it cuts."""
        sizes = cut_sizes(config)
        for name, size in sizes.items():
            if size % self.tensor:
                common = math.gcd(*sizes.values())
                works = [str(n) for n in range(1, common + 1) if common % n == 0]
                raise UserError(
                    f"train.parallel.tensor is {self.tensor}, which does not divide {name} {size}; set it to "
                    + " or ".join(works[:6])
                    + (f", or model.vocab_size to {-(-size // self.tensor) * self.tensor}" * (name == "vocab_size"))
                )


def cut_sizes(config: ModelConfig) -> dict[str, int]:
    """The numbers of a config that the axis `tensor` divides."""
    names = ["vocab_size"]
    if MAMBA in config.pattern:
        names += ["mamba_num_heads", "n_groups"]
    if ATTENTION in config.pattern:
        names += ["num_attention_heads", "num_key_value_heads"]
    if FEED_FORWARD in config.pattern:
        names.append("intermediate_size")
    return {name: getattr(config, name) for name in names}


def world() -> int:
    """Processes that were started together (torchrun says so), 1 without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes, if there are any and that has not happened: gloo between CPUs, NCCL between GPUs."""
    if world() == 1 or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def patience() -> timedelta:
    """How long ranks wait for what one does alone: WHIMBREL_PATIENCE hours, a day if it does not say."""
    said = os.environ.get("WHIMBREL_PATIENCE", "24")
    if not re.fullmatch(r"\d+(\.\d+)?", said) or not 0 < float(said) < 24 * 365:
        raise UserError(f"WHIMBREL_PATIENCE is {said!r}; set it to a number of hours, for example 24")
    return timedelta(hours=float(said))


class Share:
    """This process's place in the grid, and the sums it takes part in. With one process nothing is communicated."""

    def __init__(self, axes: Axes, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        self.axes, self.device, self.mesh = axes, device, mesh
        # What one rank does alone may take hours: those that wait for it are not torch's half an hour patient.
        self._patient = distributed.new_group(backend="gloo", timeout=patience()) if mesh else None
        self.place = {name: mesh.get_local_rank(name) if mesh else 0 for name in asdict(axes)}

    @classmethod
    def meet(cls, axes: Axes, device: torch.device) -> Share:
        """Join the processes that were started together. UserError if there are not as many as the axes make."""
        sizes = asdict(axes)
        if (started := world()) != axes.processes:
            product = " × ".join(f"{name} {value}" for name, value in sizes.items())
            raise UserError(
                f"train.parallel makes {axes.processes} processes ({product}), but {started} were started; "
                f"set the recipe's launch.processes to {axes.processes}"
            )
        if started == 1:
            return cls(axes, device)
        join()
        return cls(axes, device, init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)))

    def save(self, model: Any, folder: Path, tokenizer_folder: str | Path | None, **words: Any) -> None:
        """`checkpoint.save` from all ranks together; see `parallel/export.py`."""
        from whimbrel.parallel.export import save

        save(model, self, folder, tokenizer_folder, **words)

    @property
    def first(self) -> bool:
        """Is this the process that speaks and keeps the books?"""
        return not any(self.place.values())

    @property
    def rank(self) -> int:
        """The number of this process among all."""
        return distributed.get_rank() if self.mesh is not None else 0

    @property
    def copy(self) -> int:
        """Which of the copies of the model this rank belongs to."""
        return self.place["data"] * self.axes.fsdp + self.place["fsdp"]

    def group(self, axis: str) -> distributed.ProcessGroup:
        """The ranks that differ from this one along one axis."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    def add(self, x: Tensor, axes: Sequence[str]) -> Tensor:
        """Sum over ranks along these axes, in place; no gradient."""
        for axis in axes:
            if getattr(self.axes, axis) > 1:
                distributed.all_reduce(x, group=self.group(axis))
        return x

    def total(self, values: Mapping[str, float], axes: Sequence[str] = TOKENS) -> dict[str, float]:
        """Named numbers (the same names everywhere) summed over the ranks that see different tokens, in float64."""
        if self.axes.processes == 1:
            return dict(values)
        names = sorted(values)
        sums = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device)
        return dict(zip(names, self.add(sums, axes).tolist(), strict=True))

    def dealt(self, count: int) -> list[int]:
        """Which of `count` things that need no other rank's help this rank does, whatever its place in the grid."""
        return list(range(self.rank, count, self.axes.processes))

    def mine(self, count: int) -> list[int]:
        """Which of `count` micro-batches this rank computes: every copies-th, so that all of a step's are always the
        same whatever the number of ranks.
        """
        return list(range(self.copy, count, self.axes.copies))

    def any(self, wish: bool) -> bool:
        """Does any rank wish it?"""
        return self.total({"": float(wish)}, tuple(self.place))[""] > 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.mesh is not None:
            distributed.barrier()

    def tell(self, value: T) -> T:
        """What the first rank has, on all."""
        box: list[Any] = [value]
        if self.mesh is not None:
            distributed.broadcast_object_list(box, src=0, group=self._patient)
        return box[0]

    def collect(self, value: T) -> list[T]:
        """What each rank has, on all, by rank."""
        if self.mesh is None:
            return [value]
        found: list[Any] = [None] * self.axes.processes
        distributed.all_gather_object(found, value)
        return found

    def once(self, work: Callable[[], T]) -> T:
        """Do it on the first rank alone; its result or its `UserError` is everybody's."""
        done: Any = None
        failure: UserError | None = None
        if self.first:
            try:
                done = work()
            except UserError as error:
                failure = error
        done, failure = self.tell((done, failure))
        if failure is not None:
            raise failure
        return done


ALONE = Share(Axes(), torch.device("cpu"))
"""One process."""
