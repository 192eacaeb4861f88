"""A model by name, ready to answer: what `generate` and `chat` share."""

from __future__ import annotations

from typing import Any

import torch

from whimbrel.engine import Engine
from whimbrel.errors import UserError
from whimbrel.events import Report
from whimbrel.model.checkpoint import resolve
from whimbrel.model.language import LanguageModel
from whimbrel.text.tokenizer import Tokenizer
from whimbrel.train.threads import choose


def load_engine(model: str, dtype: str, device: str, threads: int, report: Report, **settings: Any) -> Engine:
    """An engine over a folder, a .gguf file, a fetched model's name or a hub id; `settings` are the engine's.

    On a CPU `threads` is the number of threads, 0 the one that is fastest now: on shared cores two can be many times
    slower than one.
    """
    folder = resolve(model)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"device is {device!r}, which torch cannot use here ({why}); set --device to cpu") from None
    loaded = LanguageModel.load(folder, dtype=dtype, device=device)
    if device == "cpu":
        token = torch.zeros(1, 1, dtype=torch.int64)
        torch.set_num_threads(choose(threads, None, torch.inference_mode()(lambda: loaded(token)), report))
    return Engine(loaded, Tokenizer.load(folder), report=report, **settings)
