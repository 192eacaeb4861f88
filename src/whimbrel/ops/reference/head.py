"""Losses over the vocabulary, with all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100


def log_prob(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = 0) -> Tensor:
    """log p(target) of each row [T]; 0 where the target is -100. `chunk` changes nothing here."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).T
    logp_TV = torch.log_softmax(logits_TV, dim=-1)
    chosen_T = logp_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_T == IGNORE, torch.zeros_like(chosen_T), chosen_T)


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int = 0) -> Tensor:
    """-log p(target) of each row [T]; 0 where the target is -100."""
    return -log_prob(hidden_TD, weight_VD, targets_T)


def kl(hidden_TD: Tensor, weight_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, chunk: int = 0) -> Tensor:
    """Forward KL(teacher || student) of each row [T]; no gradient flows into the teacher."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    student = torch.log_softmax(hidden_TD.to(dtype) @ weight_VD.to(dtype).T, dim=-1)
    teacher = torch.log_softmax((teacher_TD.to(dtype) @ teacher_VD.to(dtype).T).detach(), dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1)
