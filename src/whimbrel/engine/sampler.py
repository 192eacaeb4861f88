"""From logits to tokens, a whole batch at a time, with randomness that belongs to each request alone.

A draw is a pure function of (seed, sample, position): a counter-based hash gives one uniform number, and the inverse
of the cumulative distribution turns it into a token. So an answer does not depend on batch mates, on preemption, or on
the device's random generator. Letters: S rows, V vocabulary, W candidates kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from whimbrel.engine.sampling import Sampling

_MASK = (1 << 64) - 1
_CANDIDATES = 1024


class Draw(NamedTuple):
    """What the sampler needs of one row: its settings, its own randomness, and the tokens a penalty looks at."""

    sampling: Sampling
    seed: int
    sample: int
    position: int
    used_V: Tensor | None = None
    """[V] bool, ids of prompt and output; only with a repetition penalty."""


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
    """One token for each row. `logits_SV` is float32 and left as it is; one transfer to the host for each group of
    rows.

    Rows fall into three groups (greedy, whole distribution, truncated), each handled in one pass.
    """
    penalised = [row for row, draw in enumerate(draws) if draw.sampling.repetition_penalty != 1.0]
    if penalised:
        logits_SV = _penalise(logits_SV, draws, penalised)
    greedy = [row for row, draw in enumerate(draws) if draw.sampling.temperature == 0]
    if len(greedy) == len(draws):
        return logits_SV.argmax(-1).tolist()
    hot = [row for row, draw in enumerate(draws) if draw.sampling.temperature != 0]
    truncated = [row for row in hot if _truncates(draws[row].sampling)]
    whole = [row for row in hot if not _truncates(draws[row].sampling)]
    tokens = [0] * len(draws)
    for rows, choose in ((greedy, _greedy), (whole, _whole), (truncated, _truncated)):
        if rows:
            part_SV = logits_SV if len(rows) == len(draws) else logits_SV[rows]
            for row, token in zip(rows, choose(part_SV, [draws[row] for row in rows]), strict=True):
                tokens[row] = token
    return tokens


LogProb = tuple[float, tuple[tuple[int, float], ...]]


def top_log_probs(logits_SV: Tensor, tokens: Rows[int], counts: Rows[int]) -> list[LogProb]:
    """For each row the log-probability of its token under the model itself, and its `count` likeliest (id,
    log-probability). One pass over all rows.
    """
    logprobs_SV = logits_SV.log_softmax(-1)
    chosen = logprobs_SV.gather(1, torch.tensor(tokens, device=logits_SV.device)[:, None])[:, 0].tolist()
    values_SW, ids_SW = logprobs_SV.topk(min(max(counts), logits_SV.shape[-1]))
    tops = [
        tuple(zip(ids, values, strict=True)) for ids, values in zip(ids_SW.tolist(), values_SW.tolist(), strict=True)
    ]
    return [(value, top[:count]) for value, top, count in zip(chosen, tops, counts, strict=True)]


def _truncates(sampling: Sampling) -> bool:
    return sampling.top_p < 1.0 or sampling.top_k > 0


def _penalise(logits_SV: Tensor, draws: Rows[Draw], rows: list[int]) -> Tensor:
    """Repetition penalty of Keskar et al. 2019 (CTRL, §4.1), over prompt and output."""
    logits_SV = logits_SV.clone()
    for row in rows:
        used_V, penalty, row_V = draws[row].used_V, draws[row].sampling.repetition_penalty, logits_SV[row]
        assert used_V is not None, "a penalty needs the tokens it looks at"
        logits_SV[row] = torch.where(used_V, torch.where(row_V > 0, row_V / penalty, row_V * penalty), row_V)
    return logits_SV


def _greedy(logits_SV: Tensor, draws: Rows[Draw]) -> list[int]:
    return logits_SV.argmax(-1).tolist()


def _whole(logits_SV: Tensor, draws: Rows[Draw]) -> list[int]:
    """Draw from the whole vocabulary (after min_p, which needs no order)."""
    temperature_S1, _, _, min_p_S1, share_S1 = _columns(numbers(draws).to(logits_SV.device))
    some = any(draw.sampling.min_p for draw in draws)
    return _uncut(_probabilities(logits_SV, temperature_S1), min_p_S1 if some else None, share_S1).tolist()


def _truncated(logits_SV: Tensor, draws: Rows[Draw]) -> list[int]:
    """Draw after top_k, then top_p on what remains, then min_p. Sorts all V only where the likeliest do not suffice."""
    settings_5S = numbers(draws).to(logits_SV.device)
    probs_SV = _probabilities(logits_SV, settings_5S[0, :, None])
    top_SW, ids_SW = probs_SV.topk(min(probs_SV.shape[-1], _CANDIDATES))
    if not _suffice(top_SW, probs_SV.shape[-1], settings_5S).all():
        top_SW, ids_SW = probs_SV.sort(stable=True, dim=-1, descending=True)
    return _cut(top_SW, ids_SW, probs_SV.shape[-1], settings_5S).tolist()


def numbers(draws: Rows[Draw]) -> Tensor:
    """[5, S] float64 on the host, all that `draw` needs: temperature, top_p, top_k (infinite: off), min_p, and the
    uniform number of the draw.
    """
    rows = [(d.sampling.temperature, d.sampling.top_p, d.sampling.top_k or math.inf, d.sampling.min_p) for d in draws]
    pairs = zip(rows, uniforms(draws), strict=True)
    return torch.tensor([(*row, share) for row, share in pairs], dtype=torch.float64).t()


def kinds(draws: Rows[Draw]) -> tuple[bool, bool]:
    """Is any row drawn from the whole vocabulary, and any after a truncation?"""
    hot = [_truncates(draw.sampling) for draw in draws if on_device(draw) and draw.sampling.temperature != 0]
    return not all(hot), any(hot)


def on_device(draw: Draw) -> bool:
    """Can `draw` take this row? A repetition penalty looks at tokens that only the host keeps."""
    return draw.sampling.repetition_penalty == 1.0


def draw(logits_SV: Tensor, settings_5S: Tensor, whole: bool, truncated: bool) -> Tensor:
    """[S] the ids that `sample` takes, without a word to the host: -1 where it would have to sort all of V.

    whole, truncated: as `kinds` says; what it does not name is not computed.
    """
    best_S = logits_SV.argmax(-1)
    if not whole and not truncated:
        return best_S
    temperature_S1, top_p_S1, limit_S1, min_p_S1, share_S1 = _columns(settings_5S)
    probs_SV = _probabilities(logits_SV, torch.where(temperature_S1 == 0, 1.0, temperature_S1))
    ids_S = _uncut(probs_SV, min_p_S1, share_S1) if whole else best_S
    if truncated:
        top_SW, ids_SW = probs_SV.topk(min(probs_SV.shape[-1], _CANDIDATES))
        enough_S = _suffice(top_SW, probs_SV.shape[-1], settings_5S)
        cut_S = torch.where(enough_S, _cut(top_SW, ids_SW, probs_SV.shape[-1], settings_5S), -1)
        ids_S = torch.where(((top_p_S1 < 1) | limit_S1.isfinite())[:, 0], cut_S, ids_S)
    return torch.where(temperature_S1[:, 0] == 0, best_S, ids_S)


def _columns(settings_5S: Tensor) -> tuple[Tensor, ...]:
    """Each setting as [S, 1]."""
    return tuple(settings_5S[:, :, None].unbind(0))


def _suffice(top_SW: Tensor, vocabulary: int, settings_5S: Tensor) -> Tensor:
    """[S] bool: do the likeliest W hold all that top_k and top_p keep, and say what top_p is a share of?"""
    _, top_p_S, limit_S, _, _ = settings_5S.unbind(0)
    enough_S = (limit_S >= vocabulary) & (top_SW.sum(-1) >= top_p_S)
    return (limit_S.clamp(max=vocabulary) <= top_SW.shape[-1]) | enough_S


def _uncut(probs_SV: Tensor, min_p_S1: Tensor | None, share_S1: Tensor) -> Tensor:
    if min_p_S1 is not None:
        probs_SV = probs_SV.masked_fill(probs_SV < min_p_S1 * probs_SV.amax(-1, keepdim=True), 0.0)
    return _invert(probs_SV, share_S1)[:, 0]


def _cut(top_SW: Tensor, ids_SW: Tensor, vocabulary: int, settings_5S: Tensor) -> Tensor:
    """[S] ids drawn from the likeliest W, which are in order; top_p is a share of what top_k keeps."""
    _, top_p_S1, limit_S1, min_p_S1, share_S1 = _columns(settings_5S)
    kept_SW = top_SW * (torch.arange(top_SW.shape[-1], device=top_SW.device) < limit_S1)
    total_S1 = torch.where(limit_S1 < vocabulary, kept_SW.sum(-1, keepdim=True), torch.ones_like(top_SW[:, :1]))
    before_SW = kept_SW.cumsum(-1) - kept_SW
    kept_SW = kept_SW * (before_SW < top_p_S1 * total_S1)
    kept_SW = kept_SW * (kept_SW >= min_p_S1 * top_SW[:, :1])
    return ids_SW.gather(-1, _invert(kept_SW, share_S1))[:, 0]


def _probabilities(logits_SV: Tensor, temperature_S1: Tensor) -> Tensor:
    """Softmax at each row's temperature; in float64, so that a sum over V leaves no rounding a draw could fall in."""
    return (logits_SV.double() / temperature_S1).softmax(-1)


def _invert(weights_SW: Tensor, share_S1: Tensor) -> Tensor:
    """[S, 1] index at which each row's cumulative weight first exceeds its uniform share of the total."""
    cumulative_SW = weights_SW.cumsum(-1)
    index_S1 = torch.searchsorted(cumulative_SW, share_S1 * cumulative_SW[:, -1:], right=True)
    last_S1 = (weights_SW > 0).to(torch.int8).flip(-1).argmax(-1, keepdim=True)
    return index_S1.minimum(weights_SW.shape[-1] - 1 - last_S1)
