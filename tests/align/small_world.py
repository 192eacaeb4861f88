"""Problems, a vocabulary and a network for the tests of this room and for the processes they kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from whimbrel import config
from whimbrel.align import sft
from whimbrel.data.tasks import TasksSettings, draw
from whimbrel.events import silent
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.text import Tokenizer

LOOP: dict[str, Any] = {"threads": 1, "tensorboard": False, "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0}}
TASKS = TasksSettings(terms=(2, 3), conversations=400, prompts=24, validation=20, test=0)


def vocabulary() -> Tokenizer:
    """Bytes and special tokens alone."""
    return Tokenizer.train([], 64 + 256)


def network(seed: int = 0) -> LanguageModel:
    """A hybrid of four layers in which no parameter is trivial."""
    config = ModelConfig(
        pattern="M*-M",
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        tie_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=(2, 12),
    )
    model = LanguageModel(config).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def write(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(folder: Path) -> dict[str, Path]:
    """The inputs of every stage: a random model, solved problems, problems to try, and problems to judge by."""
    vocabulary().save(folder / "tokenizer")
    network().save(folder / "model", folder / "tokenizer")
    solved = [problem.conversation() for problem in draw(TASKS, "train", TASKS.conversations)]
    asked = {part: [problem.prompt() for problem in draw(TASKS, part, count)]
             for part, count in (("train", TASKS.prompts), ("validation", TASKS.validation))}  # fmt: skip
    return {
        "model": folder / "model",
        "conversations": write(folder / "conversations.jsonl", solved),
        "prompts": write(folder / "prompts.jsonl", asked["train"]),
        "validation": write(folder / "validation.jsonl", asked["validation"]),
    }


def lines(folder: Path, name: str) -> list[float]:
    """One figure of every line of the metrics file that has it."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def teach(world: dict[str, Path], out: Path) -> Path:
    """The stage `sft` on the world's conversations, half of them without thought: about 5 s."""
    said = {"off": 0.4, "cut": 0.1, "heldout": 0.05, "length": 256, "batch_rows": 2, "device": "cpu"}
    sft.run(config.parse(sft.SftSettings, said | {"train": LOOP | {"steps": 120}}), world, out, silent)
    return out
