"""The stage `sample`: what the trained model writes, in `samples.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from whimbrel.config import Settings
from whimbrel.events import Report
from whimbrel.pipeline import manifest


class SampleSettings(Settings):
    """How to sample; the words are those of `whimbrel.Sampling`."""

    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """Beginnings to go on from."""
    max_tokens: int = Field(default=96, ge=1)
    """Tokens to write at most, for each prompt."""
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Draw from the likeliest tokens that together reach this share."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many likeliest tokens; 0: all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1 makes tokens less likely that have been written before."""
    threads: int = Field(default=1, ge=1)
    """Threads of the CPU; a small model gains nothing from a second one."""
    seed: int = Field(default=0, ge=0)
    """Draws of prompt i depend on seed + i alone."""
    untrained: bool = False
    """Also let a model of the same shape with random weights write, to show what training has changed."""

    def sampling(self, index: int) -> Any:
        """The engine's request for one prompt."""
        from whimbrel.engine import Sampling

        names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
        return Sampling(**{name: getattr(self, name) for name in names}, seed=self.seed + index)


def model_folder(folder: Path) -> Path:
    """Where the checkpoint lies in a stage's output, or in a folder given as it is."""
    made = manifest.read(folder)
    return folder / made["model"] if made and made["model"] else folder


def run(settings: SampleSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Write one answer to each prompt into `samples.json`, with the settings that give it again."""
    import torch

    from whimbrel.model import LanguageModel
    from whimbrel.text import Tokenizer

    torch.set_num_threads(settings.threads)
    folder = model_folder(inputs["model"])
    model, tokenizer = LanguageModel.load(folder), Tokenizer.load(folder)
    answers = {"trained": _answers(model, tokenizer, settings, report)}
    if settings.untrained:
        fresh = LanguageModel(model.config).initialise(settings.seed)
        answers["untrained"] = _answers(fresh, tokenizer, settings, report)
    rows = [
        {"prompt": prompt} | {who: rows[index] for who, rows in answers.items()}
        for index, prompt in enumerate(settings.prompts)
    ]
    manifest.write_json(out / "samples.json", {"settings": settings.model_dump(mode="json"), "samples": rows})
    trained = answers["trained"]
    return {"samples": len(rows), "tokens": sum(row["tokens"] for row in trained)}


def _answers(model: Any, tokenizer: Any, settings: SampleSettings, report: Report) -> list[dict[str, Any]]:
    """Text, number of tokens, seed and end of each answer, in the order of the prompts."""
    from whimbrel.engine import Engine

    engine = Engine(model.eval(), tokenizer, report=report)
    requests = [settings.sampling(index) for index in range(len(settings.prompts))]
    rows = []
    for answer in engine.generate(settings.prompts, requests):
        rows.append({"text": answer.text, "tokens": len(answer.ids), "seed": answer.seed, "finish": answer.finish})
        report({"event": "progress", "done": len(rows), "total": len(requests), "unit": "answers", "text": ""})
    return rows
