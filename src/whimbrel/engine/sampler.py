"""From logits to tokens, a whole batch at a time, with randomness that belongs to each request alone.

A draw is a pure function of (seed, sample, position): a counter-based hash gives one uniform number, and the inverse
of the cumulative distribution turns it into a token. So an answer does not depend on batch mates, on preemption, or on
the device's random generator. Letters: S rows, V vocabulary, W candidates kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from whimbrel.engine.sampling import Sampling
from whimbrel.ops.segments import put

_MASK = (1 << 64) - 1
CANDIDATES = 1024
"""Likeliest ids of a row that are put in order at first."""


class Draw(NamedTuple):
    """What the sampler needs of one row: its settings, its own randomness, and the tokens a penalty looks at."""

    sampling: Sampling
    seed: int
    sample: int
    position: int
    used_V: Tensor | None = None
    """[V] bool, ids of prompt and output; only with a repetition penalty."""
    wide: bool = False
    """May it have to order all V, because its likeliest `CANDIDATES` do not hold what top_k and top_p keep?"""


class Kinds(NamedTuple):
    """What the draws of some rows need; nothing else is computed."""

    whole: bool
    """Is a row drawn from the whole vocabulary?"""
    truncated: bool
    """Is one drawn after top_k or top_p?"""
    penalised: bool = False
    greedy: bool = True
    floored: bool = True
    """Has a row of the whole vocabulary a min_p?"""
    ordered: int = 0
    """So many rows, the first ones, may have all V ordered; a row beyond them that would need it is not drawn. -1: any
    row, and the host looks which.
    """

    @property
    def plain(self) -> bool:
        """Is it the likeliest that is taken, and nothing else?"""
        return not (self.whole or self.truncated or self.penalised)


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) from three integers: the finaliser of splitmix64 (Steele et al. 2014), once for each."""
    word = 0
    for part in (seed, sample, position):
        word = (word + part + 0x9E3779B97F4A7C15) & _MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        word ^= word >> 31
    return (word >> 11) / (1 << 53)


def uniforms(draws: Rows[Draw]) -> list[float]:
    """`uniform` of each row's draw, all rows at once."""
    parts = np.array([[d.seed & _MASK, d.sample, d.position] for d in draws], dtype=np.uint64).T
    word = np.zeros(len(draws), dtype=np.uint64)
    for part in parts:
        word = word + part + np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    return ((word >> np.uint64(11)) / float(1 << 53)).tolist()


def sample(logits_SV: Tensor, draws: Rows[Draw]) -> list[int]:
    """One token for each row. `logits_SV` is float32 and left as it is. One transfer to the host, and one more if rows
    that are not known to be `wide` must be ordered; on a CPU rows of unlike kinds are drawn apart, which is less work.
    """
    groups: dict[Kinds | None, list[int]] = {}
    for row in sorted(range(len(draws)), key=lambda row: not draws[row].wide):
        groups.setdefault(None if logits_SV.is_cuda else _kind(draws[row].sampling), []).append(row)
    tokens = [0] * len(draws)
    for alike, rows in groups.items():
        mine, part_SV = [draws[row] for row in rows], pick(logits_SV, rows)
        kind = alike._replace(ordered=-1) if alike else kinds(mine)
        settings_6S = None if kind.plain else put(numbers(mine), part_SV.device, torch.float64)
        ids = draw(part_SV, settings_6S, kind, _seen(part_SV, mine) if kind.penalised else None).tolist()
        left = [place for place, token in enumerate(ids) if token < 0]
        if left:
            more = sample(pick(part_SV, left), [mine[place]._replace(wide=True) for place in left])
            ids = [more.pop(0) if token < 0 else token for token in ids]
        for row, token in zip(rows, ids, strict=True):
            tokens[row] = token
    return tokens


def pick(x: Tensor, rows: Rows[int]) -> Tensor:
    """These rows, without waiting for the device."""
    return x if list(rows) == list(range(len(x))) else x[put(rows, x.device)]


def _seen(logits_SV: Tensor, draws: Rows[Draw]) -> Tensor:
    nothing_V = torch.zeros(logits_SV.shape[1], dtype=torch.bool, device=logits_SV.device)
    return torch.stack([nothing_V if draw.used_V is None else draw.used_V for draw in draws])


LogProb = tuple[float, tuple[tuple[int, float], ...]]


def top_log_probs(logits_SV: Tensor, tokens: Rows[int], counts: Rows[int]) -> list[LogProb]:
    """For each row the log-probability of its token under the model itself, and its `count` likeliest (id,
    log-probability). One pass over all rows.
    """
    logprobs_SV, most = logits_SV.log_softmax(-1), min(max(counts), logits_SV.shape[-1])
    chosen_S1 = logprobs_SV.gather(1, put(tokens, logits_SV.device)[:, None])
    rows = torch.cat([chosen_S1.double(), *logprobs_SV.topk(most)], 1).tolist()
    tops = [tuple(zip(map(int, row[1 + most :]), row[1 : 1 + most], strict=True)) for row in rows]
    return [(row[0], top[:count]) for row, top, count in zip(rows, tops, counts, strict=True)]


def numbers(draws: Rows[Draw]) -> Tensor:
    """[6, S] float64 on the host, all that `draw` needs: temperature, top_p, top_k (infinite: off), min_p, the uniform
    number of the draw, and the repetition penalty.
    """
    rows = [
        (s.temperature, s.top_p, s.top_k or math.inf, s.min_p, share, s.repetition_penalty)
        for s, share in zip((draw.sampling for draw in draws), uniforms(draws), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).t().contiguous()


def kinds(draws: Rows[Draw]) -> Kinds:
    """What these rows need."""
    said = [draw.sampling for draw in draws]
    hot = [s.top_p < 1.0 or s.top_k > 0 for s in said if s.temperature != 0]
    penalised, floored = any(s.repetition_penalty != 1.0 for s in said), any(s.min_p for s in said)
    return Kinds(not all(hot), any(hot), penalised, len(hot) < len(said), floored, sum(draw.wide for draw in draws))


@lru_cache(maxsize=256)
def _kind(sampling: Sampling) -> Kinds:
    return kinds([Draw(sampling, 0, 0, 0)])


def draw(logits_SV: Tensor, settings_6S: Tensor | None, kind: Kinds, seen_SV: Tensor | None = None) -> Tensor:
    """[S] ids, without a word to the host: -1 where all V had to be ordered and `kind` does not allow it.

    settings_6S: as `numbers` says, unless the kind is plain. seen_SV: bool, the ids that a row's penalty looks at.
    """
    if settings_6S is None:
        return logits_SV.argmax(-1)
    temperature_S1, top_p_S1, limit_S1, min_p_S1, share_S1, penalty_S1 = _columns(settings_6S)
    if seen_SV is not None:
        logits_SV = _penalise(logits_SV, seen_SV, penalty_S1)
    if not kind.whole and not kind.truncated:
        return logits_SV.argmax(-1)
    # In float64, so that a sum over V leaves no rounding a draw could fall in.
    probs_SV = (logits_SV.double() / torch.where(temperature_S1 == 0, 1.0, temperature_S1)).softmax(-1)
    ids_S = _uncut(probs_SV, min_p_S1 if kind.floored else None, share_S1) if kind.whole else None
    if kind.truncated:
        top_SW, ids_SW = probs_SV.topk(min(probs_SV.shape[-1], CANDIDATES))
        enough_S = _suffice(top_SW, probs_SV.shape[-1], settings_6S)
        cut_S = torch.where(enough_S, _cut(top_SW, ids_SW, probs_SV.shape[-1], settings_6S), -1)
        if kind.ordered:
            rows: Any = slice(kind.ordered) if kind.ordered > 0 else (cut_S < 0).nonzero()[:, 0]
            ordered = probs_SV[rows].sort(stable=True, dim=-1, descending=True)
            whole_R = _cut(*ordered, probs_SV.shape[-1], settings_6S[:, rows])
            cut_S[rows] = torch.where(cut_S[rows] < 0, whole_R, cut_S[rows])
        ids_S = cut_S if ids_S is None else torch.where((top_p_S1 < 1)[:, 0] | limit_S1.isfinite()[:, 0], cut_S, ids_S)
    assert ids_S is not None
    return torch.where(temperature_S1[:, 0] == 0, logits_SV.argmax(-1), ids_S) if kind.greedy else ids_S


def _penalise(logits_SV: Tensor, seen_SV: Tensor, penalty_S1: Tensor) -> Tensor:
    """Repetition penalty of Keskar et al. 2019 (CTRL, section 4.1), over prompt and output; one of 1 changes no bit."""
    penalty_S1 = penalty_S1.to(logits_SV.dtype)
    less_SV = torch.where(logits_SV > 0, logits_SV / penalty_S1, logits_SV * penalty_S1)
    return torch.where(seen_SV, less_SV, logits_SV)


def _columns(settings_6S: Tensor) -> tuple[Tensor, ...]:
    """Each setting as [S, 1]."""
    return tuple(settings_6S[:, :, None].unbind(0))


def _suffice(top_SW: Tensor, vocabulary: int, settings_6S: Tensor) -> Tensor:
    """[S] bool: do the likeliest W hold all that top_k and top_p keep, and say what top_p is a share of?"""
    _, top_p_S, limit_S, _, _, _ = settings_6S.unbind(0)
    enough_S = (limit_S >= vocabulary) & (top_SW.sum(-1) >= top_p_S)
    return (limit_S.clamp(max=vocabulary) <= top_SW.shape[-1]) | enough_S


def _uncut(probs_SV: Tensor, min_p_S1: Tensor | None, share_S1: Tensor) -> Tensor:
    if min_p_S1 is not None:
        probs_SV = probs_SV.masked_fill(probs_SV < min_p_S1 * probs_SV.amax(-1, keepdim=True), 0.0)
    return _invert(probs_SV, share_S1)[:, 0]


def _cut(top_SW: Tensor, ids_SW: Tensor, vocabulary: int, settings_6S: Tensor) -> Tensor:
    """[S] ids drawn from the likeliest W, which are in order; top_p is a share of what top_k keeps."""
    _, top_p_S1, limit_S1, min_p_S1, share_S1, _ = _columns(settings_6S)
    kept_SW = top_SW * (torch.arange(top_SW.shape[-1], device=top_SW.device) < limit_S1)
    total_S1 = torch.where(limit_S1 < vocabulary, kept_SW.sum(-1, keepdim=True), torch.ones_like(top_SW[:, :1]))
    before_SW = kept_SW.cumsum(-1) - kept_SW
    kept_SW = kept_SW * (before_SW < top_p_S1 * total_S1)
    kept_SW = kept_SW * (kept_SW >= min_p_S1 * top_SW[:, :1])
    return ids_SW.gather(-1, _invert(kept_SW, share_S1))[:, 0]


def _invert(weights_SW: Tensor, share_S1: Tensor) -> Tensor:
    """[S, 1] index at which each row's cumulative weight first exceeds its uniform share of the total."""
    cumulative_SW = weights_SW.cumsum(-1)
    index_S1 = torch.searchsorted(cumulative_SW, share_S1 * cumulative_SW[:, -1:], right=True)
    last_S1 = (weights_SW > 0).to(torch.int8).flip(-1).argmax(-1, keepdim=True)
    return index_S1.minimum(weights_SW.shape[-1] - 1 - last_S1)
