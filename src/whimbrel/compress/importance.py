"""What the parts of a network are worth, read from its activations on a calibration set: forward passes only.

Minitron (arXiv 2407.14679, section 2.2) and its hybrid form (arXiv 2504.11409, section 3). Every score is the mean of
absolute activations over the tokens of a sample, then the root of the sum of squares over the samples (mean/L2).

T tokens of a sample, D model width, F feed-forward width, H heads, P Mamba head width, E attention head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whimbrel.events import Report, silent
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.train.objective import Batch

DEPTH_SCORES = ("mse", "cosine")


@dataclass(frozen=True)
class Importance:
    """Scores of the units of every axis; they are compared inside an axis alone."""

    channels_D: Tensor
    """Embedding channels: summed over the outputs of all norms."""
    units: Mapping[int, Tensor]
    """By layer. `-`: [F], of what enters the second projection. `M`: [H, P], of the x that leaves the first one. `*`:
    [H], of the norms of what enters the last one."""


@torch.no_grad()
def measure(model: LanguageModel, samples: Sequence[Batch]) -> Importance:
    """Scores from rows; each batch is one sample."""
    squares: dict[tuple[str, int], Tensor] = {}

    def note(key: tuple[str, int], x_TU: Tensor) -> None:
        mean_U = x_TU.abs().mean(0, dtype=torch.float64).cpu()
        squares[key] = squares.get(key, torch.zeros(())) + mean_U.square()

    with ExitStack() as stack:
        for handle in _taps(model, note):
            stack.enter_context(handle)
        for sample in samples:
            hidden(model, sample)
    scores = {key: square.sqrt() for key, square in squares.items()}
    config = model.config
    units = {layer: score for (kind, layer), score in scores.items() if kind == "mixer"}
    for layer in config.indices(MAMBA):
        units[layer] = units[layer].unflatten(0, (config.mamba_num_heads, config.mamba_head_dim))
    return Importance(torch.stack([score for (kind, _), score in scores.items() if kind == "norm"]).sum(0), units)


def _taps(model: LanguageModel, note: Callable[[tuple[str, int], Tensor], None]) -> Iterator[Any]:
    """Handles of hooks that note what each unit carries."""
    config = model.config
    norms: list[Any] = [*(layer.norm for layer in model.layers), model.norm_f]
    for place, norm in enumerate(norms):
        yield norm.register_forward_hook(lambda _m, _x, out, key=("norm", place): note(key, out))
    for place, layer in enumerate(model.layers):
        mixer: Any = layer.mixer
        key = ("mixer", place)
        if config.pattern[place] == MAMBA:
            inner = slice(config.mamba_inner, 2 * config.mamba_inner)  # x, between z and B
            yield mixer.in_proj.register_forward_hook(lambda _m, _x, y, key=key, x=inner: note(key, y[:, x]))
        elif config.pattern[place] == ATTENTION:
            split = partial(torch.unflatten, dim=-1, sizes=(config.num_attention_heads, config.head_dim))
            yield mixer.o_proj.register_forward_pre_hook(
                lambda _m, x, key=key, split=split: note(key, split(x[0]).norm(dim=-1))
            )
        else:
            assert config.pattern[place] == FEED_FORWARD
            yield mixer.down_proj.register_forward_pre_hook(lambda _m, x, key=key: note(key, x[0]))


def hidden(model: LanguageModel, batch: Batch) -> Tensor:
    """hidden_TD after the final norm."""
    tokens_T = torch.from_numpy(batch.tokens_T).to(model.device)
    return model(tokens_T, Layout.of(batch.lengths, device=model.device))


def blocks(config: ModelConfig) -> list[tuple[int, ...]]:
    """What can be taken out at once: one layer, or the pair `*-` where the family's folder knows nothing else."""
    step = 1 if config.family == "nemotron_h" else 2
    return [tuple(range(first, first + step)) for first in range(0, config.layers, step)]


@torch.no_grad()
def depths(
    model: LanguageModel, samples: Sequence[Batch], least: int, score: str = "mse", report: Report = silent
) -> dict[int, tuple[int, ...]]:
    """The layers that stay, by their number, from all down to `least`; one of each letter always does.

    `mse`: the layer goes without which the logits move least from the whole network's, then one looks again (Nemotron
    Nano 2, arXiv 2508.14444, section 4.1). `cosine`: those that turn the stream least, 1 - cos(in, out), from one look
    (Minitron's block influence).
    """
    config, left = model.config, blocks(model.config)
    turns = _turns(model, samples, left) if score == "cosine" else {}
    whole, gram_DD = [hidden(model, sample) for sample in samples], _gram(model)
    power = sum(turns.values()) or sum(_energy(h_TD, gram_DD) for h_TD in whole)
    stay = {config.layers: tuple(range(config.layers))}
    while min(stay) > least:
        pattern = "".join(config.pattern[i] for i in stay[min(stay)])
        free = [block for block in left if all(pattern.count(config.pattern[i]) > 1 for i in block)]
        errors = turns or _errors(model, samples, whole, left, gram_DD)
        gone = min(free, key=errors.__getitem__)
        left.remove(gone)
        stay[min(stay) - len(gone)] = tuple(layer for block in left for layer in block)
        kind, share = "".join(config.pattern[i] for i in gone), errors[gone] / power
        report({"event": "log", "text": f"of {len(pattern)} layers {gone[0]} ({kind}) matters least: {share:.2%}"})
    return stay


def _gram(model: LanguageModel) -> Tensor:
    """WᵀW [D, D] of the head: |W d|² = dᵀ WᵀW d, the energy of all logits without a single one of them."""
    nothing = torch.empty(0, device=model.device)
    return model.head(nothing, lambda _h, weight_VD: weight_VD.float().t() @ weight_VD.float())


def _energy(d_TD: Tensor, gram_DD: Tensor) -> float:
    """Sum of squares of the logits of d."""
    return float(((d_TD.float() @ gram_DD) * d_TD.float()).sum(dtype=torch.float64))


def _errors(
    model: LanguageModel,
    samples: Sequence[Batch],
    whole: Sequence[Tensor],
    left: Sequence[tuple[int, ...]],
    gram_DD: Tensor,
) -> dict[tuple[int, ...], float]:
    """Summed squared error of the logits with one more block gone, for each."""
    errors = dict.fromkeys(left, 0.0)
    for sample, whole_TD in zip(samples, whole, strict=True):
        layout = Layout.of(sample.lengths, device=model.device)
        x_TD = model.embeddings(torch.from_numpy(sample.tokens_T).to(model.device))
        for place, block in enumerate(left):
            y_TD = x_TD
            for later in left[place + 1 :]:
                y_TD = _run(model, later, y_TD, layout)
            errors[block] += _energy(model.norm_f(y_TD) - whole_TD, gram_DD)
            x_TD = _run(model, block, x_TD, layout)
    return errors


def _run(model: LanguageModel, block: tuple[int, ...], x_TD: Tensor, layout: Layout) -> Tensor:
    for place in block:
        x_TD = model.layers[place](x_TD, layout, None)
    return x_TD


def _turns(
    model: LanguageModel, samples: Sequence[Batch], left: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """How far each block turns the stream: 1 - cos(in, out), summed over tokens."""
    turns = dict.fromkeys(left, 0.0)
    for sample in samples:
        layout = Layout.of(sample.lengths, device=model.device)
        x_TD = model.embeddings(torch.from_numpy(sample.tokens_T).to(model.device))
        for block in left:
            y_TD = _run(model, block, x_TD, layout)
            turns[block] += float((1 - torch.cosine_similarity(x_TD, y_TD)).sum())
            x_TD = y_TD
    return turns
