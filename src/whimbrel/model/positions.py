"""Rotary frequencies (arXiv 2104.09864), and Llama-3.1's stretching of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from whimbrel.model.config import ModelConfig


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """[R] angle per position of each pair of channels, float64: theta^(-i/R), R half of the rotating channels of a
    head.
    """
    assert config.rope_theta is not None
    half = config.rotary_width // 2
    inverse_R = config.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse_R
    original = scaling.original_max_position_embeddings
    wave_R = 2 * math.pi / inverse_R
    blend_R = (original / wave_R - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend_R = blend_R.clamp(
        0, 1
    )  # 0: waves longer than original/low_freq_factor, 1: shorter than original/high_freq_factor
    return (1 - blend_R) * inverse_R / scaling.factor + blend_R * inverse_R


def rotation(config: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos_TR and sin_TR of the angles in float32; the angles are float64, so that far positions stay exact."""
    angles_TR = positions_T.to(torch.float64)[:, None] * frequencies(config, positions_T.device)
    return angles_TR.cos().float(), angles_TR.sin().float()
