"""What few bits cost: perplexity of SmolLM2 on real pages, ours in 8 and 4 bits beside llama.cpp's q8_0 and q4_0.

Text: the first 512 tokens of each of 16 English pages of `data/pages`; gptq is calibrated with 16 windows of 1,024
tokens of the pages after those. The file that `whimbrel fetch smollm2` brings is Q4_1; its weights, as float32, are
what all sides round anew. llama.cpp reads our own export. Both sides round activations to 8 bits, 32 at a time, before
they meet codes: ours here in torch, as the native kernels do it. Beside each perplexity: the mean difference of the
log-probabilities to float32, its standard error over the tokens, and the bits that a parameter takes on the average.
Run: python benchmarks/smollm2_bits.py --peer-python PYTHON [--rows int4/32-gptq …]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cpu_peer import LlamaCpp
from side_by_side import record_row
from torch import Tensor

from whimbrel import LanguageModel, Tokenizer
from whimbrel.compress.quantize import WINDOW, round_model
from whimbrel.data import extract, filters, language, pages
from whimbrel.engine.score import score_pairs
from whimbrel.model import count
from whimbrel.model.fetch import fetched
from whimbrel.model.gguf_write import write
from whimbrel.model.linear import PackedLinear, pack_model

PAGES = Path(__file__).parents[1] / "data" / "pages"
DOCUMENTS, TOKENS, CALIBRATE = 16, 512, 16
OURS = ["float32", "float16"] + [
    f"int{bits}/{group}-{method}" for bits in (8, 4) for group in (32, 64) for method in ("rtn", "gptq")
]
THEIRS = ["f16", "q8_0", "q4_0"]


def texts() -> Iterator[str]:
    """Pages that a data stage would keep."""
    for file, source, address in pages.find([PAGES]):
        for page in pages.read(file, source, address, 2**20):
            if page.drop is None:
                text = extract.clean(extract.main_content(extract.decode(page.body, page.charset)))
                if language.detect(text)[0] == "en" and filters.check(text, filters.Limits()) is None:
                    yield text


def round_activations(model: LanguageModel) -> None:
    """From now on the model rounds what meets its codes as native/src/rows.h does."""

    def rounded(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].unflatten(-1, (-1, 32))
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return ((x / scale).round().mul(scale).flatten(-2), *inputs[1:])

    for module in model.modules():
        if isinstance(module, PackedLinear) or module is model.head:
            module.register_forward_pre_hook(rounded)


class Ours:
    """The same ids scored with every form of the weights."""

    def __init__(self) -> None:
        self.place = fetched("smollm2")
        tokenizer = Tokenizer.load(self.place)
        every = (ids for text in texts() if len(ids := tokenizer.encode(text)) >= TOKENS)
        self.rows = [ids[:TOKENS] for ids in itertools.islice(every, DOCUMENTS)]
        rest = itertools.islice((ids for ids in every if len(ids) >= WINDOW), CALIBRATE)
        self.calibration = [torch.tensor(ids[:WINDOW]) for ids in rest]
        self.numbers = count.total(LanguageModel.load(self.place).config)
        self.base, _ = self.losses(LanguageModel.load(self.place))

    def losses(self, model: LanguageModel) -> tuple[list[float], int]:
        """Of every token but the first of a row; and the bytes of the weights."""
        losses = [-x for row in self.rows for x in score_pairs(model, [(row[:1], row[1:])], TOKENS)[0]]
        return losses, sum(tensor.nbytes for tensor in model.state_dict().values())

    def row(self, name: str) -> dict[str, float]:
        """One of OURS."""
        model = LanguageModel.load(self.place).requires_grad_(False)
        if name == "float16":
            pack_model(model, 16)
        elif name != "float32":
            form, _, method = name.partition("-")
            bits, _, group = form.removeprefix("int").partition("/")
            round_model(model, int(bits), int(group), method, self.calibration)
            round_activations(model)
        return self.compare(*self.losses(model))

    def compare(self, losses: list[float], nbytes: int) -> dict[str, float]:
        """Perplexity, and the mean loss beside float32's."""
        differences = [b - a for a, b in zip(self.base, losses, strict=True)]
        return {
            "perplexity": math.exp(statistics.fmean(losses)),
            "worse_nats": statistics.fmean(differences),
            "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
            "megabytes": nbytes / 1e6,
            "bits_per_weight": 8 * nbytes / self.numbers,
        }


def main() -> None:
    """Score the same ids with every form of the weights; keep each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has llama-cpp-python, for the rows of llama.cpp")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", nargs="+", choices=[*OURS, *THEIRS], help="these alone")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "whimbrel" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours = Ours()
    peer = LlamaCpp(options.peer_python, options.threads) if options.peer_python else None
    for name in options.rows or [*OURS, *(THEIRS if peer else ())]:
        if name in OURS:
            found: dict[str, Any] = {**ours.row(name), "calibration_tokens": CALIBRATE * WINDOW * ("gptq" in name)}
        else:
            assert peer is not None, "--peer-python"
            file = write(ours.place, options.cache / f"smollm2-{name}.gguf", name)
            peer.load(file, flash=True, context=TOKENS, sequences=1, ubatch=TOKENS)
            losses = [loss for row in ours.rows for loss in peer.ask("nll", ids=row)]
            found = {**ours.compare(losses, file.stat().st_size), "version": peer.version}
        record_row("smollm2_bits", f"{'whimbrel' if name in OURS else 'llama.cpp'} {name}", found)
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
