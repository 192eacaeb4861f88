"""What few bits cost: perplexity of SmolLM2 on real pages, ours in 8 and 4 bits beside llama.cpp's q8_0 and q4_0.

Text: the first 512 tokens of each of 16 English pages of `data/pages`. The file that `whimbrel fetch smollm2` brings is
Q4_1; its weights, as float32, are what all sides round anew. llama.cpp reads our own export. Beside each perplexity:
the mean difference of the log-probabilities to float32, and its standard error over the tokens.
Run: python benchmarks/smollm2_bits.py --peer-python PYTHON [--folder calibrated=FOLDER …]
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cpu_peer import LlamaCpp
from side_by_side import record

from whimbrel import LanguageModel, Tokenizer
from whimbrel.data import extract, filters, language, pages
from whimbrel.engine.score import score_pairs
from whimbrel.model.fetch import fetched
from whimbrel.model.gguf_write import write
from whimbrel.model.linear import pack_model

PAGES = Path(__file__).parents[1] / "data" / "pages"
DOCUMENTS, TOKENS = 16, 512
OURS = {"float16": (16, 0), "int8, groups of 32": (8, 32), "int8, groups of 64": (8, 64), "int4, groups of 32": (4, 32)}


def texts() -> Iterator[str]:
    """Pages that a data stage would keep."""
    for file, source, address in pages.find([PAGES]):
        for page in pages.read(file, source, address, 2**20):
            if page.drop is None:
                text = extract.clean(extract.main_content(extract.decode(page.body, page.charset)))
                if language.detect(text)[0] == "en" and filters.check(text, filters.Limits()) is None:
                    yield text


def compare(base: list[float], other: list[float], nbytes: int) -> dict[str, float]:
    """Perplexity, and the mean loss beside float32's."""
    differences = [b - a for a, b in zip(base, other, strict=True)]
    return {
        "perplexity": math.exp(statistics.fmean(other)),
        "worse_nats": statistics.fmean(differences),
        "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
        "megabytes": nbytes / 1e6,
    }


def main() -> None:
    """Score the same ids with every form of the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--folder", action="append", default=[], metavar="NAME=FOLDER", help="a quantised folder of ours"
    )
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "whimbrel" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place = fetched("smollm2")
    tokenizer = Tokenizer.load(place)
    long = (ids for text in texts() if len(ids := tokenizer.encode(text)[:TOKENS]) == TOKENS)
    rows = list(itertools.islice(long, DOCUMENTS))

    def ours(load: Callable[[], LanguageModel]) -> tuple[list[float], int]:
        model = load()
        losses = [-x for row in rows for x in score_pairs(model, [(row[:1], row[1:])], TOKENS)[0]]
        return losses, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    def rounded(bits: int, group: int) -> LanguageModel:
        model = LanguageModel.load(place)
        pack_model(model, bits, *([group] if group else []))
        return model

    base, nbytes = ours(lambda: LanguageModel.load(place))
    found: dict[str, Any] = {"whimbrel float32": compare(base, base, nbytes)}
    for name, settings in OURS.items():
        found[f"whimbrel {name}"] = compare(base, *ours(lambda s=settings: rounded(*s)))
    for named in options.folder:
        name, _, folder = named.partition("=")
        found[f"whimbrel {name}"] = compare(base, *ours(lambda f=folder: LanguageModel.load(f)))
    peer = LlamaCpp(options.peer_python, options.threads)
    for kind in ("f16", "q8_0", "q4_0"):
        file = write(place, options.cache / f"smollm2-{kind}.gguf", kind)
        peer.load(file, flash=True, context=TOKENS, sequences=1, ubatch=TOKENS)
        losses = [loss for row in rows for loss in peer.ask("nll", ids=row)]
        found[f"llama.cpp {kind}"] = compare(base, losses, file.stat().st_size)
    record(
        "smollm2_bits",
        {
            "model": "SmolLM2-135M-Instruct (Q4_1 weights as float32)",
            "text": f"{len(rows)} pages of data/pages, {TOKENS} tokens of each",
            "peer": f"llama-cpp-python {peer.version}",
            "rows": found,
        },
    )


if __name__ == "__main__":
    main()
