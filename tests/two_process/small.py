"""Models and batches so small that a step takes milliseconds, with everything in them that can be cut wrongly."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel

HYBRID = ModelConfig(
    pattern="M-M*-M",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=6,
    n_groups=4,
    mamba_bias=True,
)
CLASSIC = ModelConfig(
    pattern="*-*-",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    mlp="swiglu",
    mlp_bias=True,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    attention_bias=True,
    qk_norm=True,
    rope_theta=1e4,
    norm="layernorm1p",
    tie_embeddings=True,
    family="llama",
)


def model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """Random weights, none of them trivial."""
    made = LanguageModel(config).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@dataclass(frozen=True)
class Packed:
    """Documents end to end; some targets are not to be learned."""

    tokens_T: NDArray[np.int64]
    targets_T: NDArray[np.int64]
    lengths: tuple[int, ...]


LENGTHS = [(37, 5, 60), (1, 2, 90, 3), (120,), (9,) * 7, (70, 66), (5,), (3, 40), (64, 64)]
"""Documents of each micro-batch: one that covers several ranks, one of fewer tokens than a convolution is wide, …"""


@dataclass(frozen=True)
class Rows:
    """Micro-batches with very different numbers of targets."""

    seed: int = 0

    def batch(self, index: int) -> Packed:
        """The batch of an index."""
        draw = np.random.default_rng([self.seed, index])
        lengths = LENGTHS[index % len(LENGTHS)]
        starts = np.cumsum((0, *lengths))
        tokens = draw.integers(0, 48, starts[-1])
        targets = np.append(tokens[1:], -100)
        targets[starts[1:] - 1] = -100
        targets[draw.random(len(targets)) < 0.1 * (index % 5)] = -100
        return Packed(tokens, targets, lengths)


def launch(script: str, processes: int, *words: object, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Run a script of this folder in several processes that know of each other, as torchrun would; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(here / script), *map(str, words)]
    running = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    done = []
    try:
        for process in running:
            out, err = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(command, process.returncode, out, err))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    for result in done:
        assert result.returncode == 0, f"status {result.returncode}: {result.stderr[-4000:]}"
    return done
