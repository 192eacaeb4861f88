"""AdamW, with every parameter put by its name into one of two groups: it decays, or it does not.

Matrices decay: projections, the convolution, the embedding and the head (as in the recipes of the Nemotron papers,
weight decay 0.1 and beta 0.9/0.95; a tied embedding is one parameter and decays once). Norms, biases, A_log, D and
dt_bias do not: pulling them to zero would change time scales and gains, not the size of a map (Mamba-2's own code marks
the last three the same way).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whimbrel.errors import UserError

DECAYS = re.compile(
    r"(^|\.)((embeddings|head|in_proj|out_proj|[qkvo]_proj|gate_proj|up_proj|down_proj|reward)\.weight|conv_weight|lora_[AB])$"
)
STAYS = re.compile(r"(^|\.)((norm|norm_f)\.weight|(\w+_)?norm_weight|bias|(\w+_)?bias|A_log|D)$")

FUSED = ("cpu", "cuda")
"""Devices whose AdamW torch runs as one kernel over all parameters."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101)."""

    learning_rate: float = 1e-3
    """Peak of the schedule."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only, times the learning rate of the step."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"optimizer.learning_rate is {self.learning_rate}; set it above 0, for example 1e-3")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; set it in [0, 1), for example 0.9")
        if not 0 < self.eps < math.inf:
            raise UserError(f"optimizer.eps is {self.eps}; set it above 0, for example 1e-8")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}; set it to 0 or more, for example 0.1")


def decays(name: str) -> bool:
    """Whether weight decay pulls on the parameter of this name.

    A name that fits neither list is a programmer's mistake.
    """
    pulled, left = DECAYS.search(name) is not None, STAYS.search(name) is not None
    assert pulled != left, f"{name} must be in exactly one of DECAYS and STAYS in train/optimizer.py"
    return pulled


def adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a model; fused where torch has it.

    The loop sets the learning rate of each step.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable if decays(name)], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in trainable if not decays(name)], "weight_decay": 0.0},
    ]
    assert sum(len(group["params"]) for group in groups) == len(trainable), "a parameter was left out"
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=trainable[0][1].device.type in FUSED,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
