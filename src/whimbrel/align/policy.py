"""The mathematics of GRPO: advantages inside a group, the clipped surrogate, estimators of the KL divergence.

Shao et al., arXiv 2402.03300 (GRPO); Ahmadian et al., arXiv 2402.14740 (leave one out); Yu et al., arXiv 2503.14476
(clip higher, token mean, groups without spread dropped). T packed tokens, R sampled tokens that are learned, G samples
of a prompt, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whimbrel import ops
from whimbrel.model import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.train.objective import Term

Floats = NDArray[np.float32]
FAR = 20.0
"""Largest |log p_ref - log p| that an estimator sees: beyond it, exp would drown everything else."""


def advantages(rewards: Sequence[float], leave_one_out: bool, normalise: bool) -> list[float] | None:
    """r_i minus the mean of the others (or of the group), over the group's standard deviation if `normalise`.

    None for a group whose rewards are all equal: nothing is to be learned from it.
    """
    values_G = np.asarray(rewards, np.float64)
    if np.ptp(values_G) == 0:
        return None
    away_G = values_G - values_G.mean()
    away_G *= len(values_G) / (len(values_G) - 1) if leave_one_out else 1.0  # r - mean of others, the same thing
    return (away_G / values_G.std(ddof=1) if normalise else away_G).tolist()


def divergence(kind: str, log_p: Tensor, log_ref: Tensor) -> Tensor:
    """Estimate KL(p || ref) at tokens drawn from p (Schulman 2020): with d = log ref - log p, `k1` is -d, `k2` d^2 / 2,
    `k3` exp(d) - 1 - d.

    k1 and k3 are right on average; the gradient of k2 is, too, while that of k1 has mean zero.
    """
    d = (log_ref - log_p).clamp(-FAR, FAR)
    return -d if kind == "k1" else d.square() / 2 if kind == "k2" else torch.expm1(d) - d


def surrogate(log_p: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A), ratio = p / p_old: what is maximised (PPO, arXiv 1707.06347)."""
    ratio = (log_p - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


@dataclass(frozen=True)
class PolicyBatch:
    """Prompts and answers laid end to end, and what was known of the R tokens to learn when they were drawn."""

    tokens_T: NDArray[np.int64]
    lengths: tuple[int, ...]
    rows_R: NDArray[np.int64]
    """The token before each learned one."""
    targets_R: NDArray[np.int64]
    advantage_R: Floats
    sampler_R: Floats
    """Log-probabilities that the engine drew with."""
    old_R: Floats | None = None
    """The same from the trainer's own pass, before the update."""
    reference_R: Floats | None = None
    """Under the frozen reference, if there is one."""

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One of the arrays on a device."""
        return torch.from_numpy(getattr(self, name)).to(device)


def log_probs(model: LanguageModel, batch: PolicyBatch, chunk: int) -> Tensor:
    """[R] log-probability of each learned token."""
    device = model.device
    layout = Layout.of(batch.lengths, rows=batch.tensor("rows_R", device), device=device)
    hidden_RD = model(batch.tensor("tokens_T", device), layout)
    targets_R = batch.tensor("targets_R", device)
    return model.head(hidden_RD, lambda hidden, weight: ops.log_prob(hidden, weight, targets_R, chunk))


@dataclass(frozen=True)
class PolicyGradient:
    """The clipped surrogate and the KL divergence, each a mean over the learned tokens of all micro-batches."""

    clip_low: float
    clip_high: float
    kl: str = "none"
    kl_coefficient: float = 0.0
    chunk: int = 1024

    def counts(self, batch: PolicyBatch) -> dict[str, int]:
        """Learned tokens."""
        names = ("policy", "clipped") + (("kl",) if self.kl != "none" else ())
        return dict.fromkeys(names, len(batch.targets_R))

    def __call__(self, model: LanguageModel, batch: PolicyBatch) -> dict[str, Term]:
        """Terms `policy` (minus the surrogate), `kl`, and `clipped`, the share of tokens whose ratio was clipped."""
        count, device = len(batch.targets_R), model.device
        log_p_R = log_probs(model, batch, self.chunk)
        old_R, advantage_R = batch.tensor("old_R", device), batch.tensor("advantage_R", device)
        gain_R = surrogate(log_p_R, old_R, advantage_R, self.clip_low, self.clip_high)
        clipped = (gain_R != (log_p_R - old_R).exp() * advantage_R).sum().float()
        terms = {"policy": Term(-gain_R.sum(), count), "clipped": Term(clipped, count, 0.0)}
        if self.kl != "none":
            kl_R = divergence(self.kl, log_p_R, batch.tensor("reference_R", device))
            terms["kl"] = Term(kl_R.sum(), count, self.kl_coefficient)
        return terms
