"""`whimbrel quantize`: a model's folder with matrices of 8 or 4 bits, and what that cost, measured and written down.

Rounded are all projections and the head, and the embedding if it is the head too (else it becomes float16). Left as
they are: norms, convolutions, A_log, D, dt_bias, biases. A matrix whose inputs the group does not divide becomes
float16.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whimbrel.compress.calibrate import perplexity, visit
from whimbrel.compress.rounding import calibrated
from whimbrel.errors import UserError, nearest
from whimbrel.events import Report, silent
from whimbrel.model import checkpoint
from whimbrel.model.fewbits import FewBits
from whimbrel.model.language import LanguageModel
from whimbrel.model.linear import matrices, place
from whimbrel.ops.packed import GROUPS, Packed, pack, round_to_nearest, unpack
from whimbrel.text import Tokenizer
from whimbrel.units import format_bytes

BITS = {"int8": 8, "int4": 4}
METHODS = {"rtn": "each weight to the nearest", "gptq": "calibrated on real text (GPTQ, arXiv 2210.17323, and descent)"}
PAGE = Path(__file__).with_name("corcovado.txt")
"""A page of Darwin's Journal of Researches (1845, in the public domain), read where no text is given."""
WINDOW, CALIBRATE, MEASURE = 1024, 32_768, 8_192
"""Tokens that are read at a time, for calibration, and for the perplexity."""


@dataclass(frozen=True)
class Result:
    """What was written. Bytes are those of all weights of the folder."""

    form: str
    method: str
    weights_bytes: int
    bits_per_weight: float
    """Of the matrices that were rounded, scales included."""
    float16: tuple[str, ...]
    """Matrices whose inputs the group does not divide."""
    perplexity_before: float
    perplexity_after: float
    measured_tokens: int
    calibration_tokens: int
    text: str

    def facts(self, dtype: str) -> dict[str, str]:
        """Rows of a model card."""
        calibrated = f" with {self.calibration_tokens:,} tokens" if self.calibration_tokens else ""
        rows = {
            "stored as": f"{self.form}, {METHODS[self.method]}{calibrated}",
            "bits a weight": f"{self.bits_per_weight:.2f} where rounded; {format_bytes(self.weights_bytes)} in all",
            "perplexity": f"{self.perplexity_before:.4g} in {dtype}, {self.perplexity_after:.4g} as stored here "
            f"({self.measured_tokens:,} tokens of {self.text})",
        }
        return rows | ({"left as float16": ", ".join(self.float16)} if self.float16 else {})


def quantize(
    source: str,
    out: str | Path,
    *,
    to: str,
    group: int = 32,
    method: str = "rtn",
    texts: Sequence[Path] = (),
    dtype: str = "float32",
    report: Report = silent,
) -> Result:
    """Write the model `source` in few bits into the folder `out`, whole or not at all.

    `texts` are files of plain text like what the model will read: with every fifth window of them perplexity is
    measured, before and after, and gptq is calibrated with the others. Without them a page of Darwin is measured.
    """
    folder, out = checkpoint.resolve(source), Path(out)
    _check(to, group, method, texts)
    checkpoint.check_target(out)
    if out.resolve() == folder.resolve():
        raise UserError(f"--out is {out}, the model itself; name another folder, such as {out}-{to}")
    if (form := checkpoint.load_form(folder)) is not None:
        raise UserError(f"{source} holds {form.name} already; quantise the model that it was made from")
    measured, calibration = _windows(Tokenizer.load(folder), texts, method)
    model = LanguageModel.load(folder, dtype=dtype).requires_grad_(False)
    before = perplexity(model, measured)
    report({"event": "log", "text": f"perplexity before: {before:.4g}"})
    float16 = round_model(model, BITS[to], group, method, calibration, report)
    rounded = [w for w in matrices(model).values() if isinstance(w, Packed) and w.bits < 16]
    result = Result(
        form=FewBits(BITS[to], group).name,
        method=method,
        weights_bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
        bits_per_weight=8 * sum(w.nbytes for w in rounded) / sum(math.prod(w.shape) for w in rounded),
        float16=float16,
        perplexity_before=before,
        perplexity_after=perplexity(model, measured),
        measured_tokens=sum(len(tokens_T) - 1 for tokens_T in measured),
        calibration_tokens=sum(map(len, calibration)),
        text=", ".join(path.name for path in texts or (PAGE,)),
    )
    licence = _licence(folder)
    command = f"whimbrel quantize --to {to} --group {group} --method {method}"
    made_from = f"{Path(source).name} ({licence or 'licence not stated'}), by `{command}`"
    checkpoint.save(model, out, folder, lineage=[made_from], licence=licence, facts=result.facts(dtype))
    return result


def round_model(
    model: LanguageModel, bits: int, group: int, method: str, calibration: Sequence[Tensor], report: Report = silent
) -> tuple[str, ...]:
    """Round the matrices of a model in place; names of those that became float16 because the group does not fit."""
    names = list(matrices(model))
    odd = tuple(name for name in names if matrices(model)[name].shape[1] % group)
    if len(odd) == len(names):
        inputs = {matrices(model)[name].shape[1] for name in names}
        works = [size for size in GROUPS if any(width % size == 0 for width in inputs)]
        hint = f"set it to {works[-1]}" if works else "32 and 64 do not either, so it stays as it is"
        raise UserError(f"--group is {group}, which divides the inputs of no matrix of this model; {hint}")
    kept = {*odd} if model.config.tie_embeddings else {*odd, "embeddings"}
    for name in kept:
        place(model, name, round_to_nearest(_weight(model, name), 16))
    visits = visit(model, calibration) if method == "gptq" else ((name, None) for name in names)
    for done, (name, gram_II) in enumerate(visits, start=1):
        if name not in kept:
            weight_OI = _weight(model, name)
            if gram_II is None:
                place(model, name, round_to_nearest(weight_OI, bits, group))
            else:
                place(model, name, pack(*calibrated(weight_OI, gram_II, bits, group), bits))
        report({"event": "progress", "done": done, "total": len(names), "unit": "matrices"})
    return odd


def _weight(model: LanguageModel, name: str) -> Tensor:
    """A matrix in float32."""
    weight = matrices(model)[name]
    return weight.detach().float() if isinstance(weight, Tensor) else unpack(weight)


def _check(to: str, group: int, method: str, texts: Sequence[Path]) -> None:
    for name, value, known in (("--to", to, BITS), ("--method", method, METHODS)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; {nearest(value, known)}")
    if group not in GROUPS:
        raise UserError(f"--group is {group}; set it to 32, 64 or 128 inputs that share a scale")
    if method == "gptq" and not texts:
        raise UserError("--method gptq needs text like what the model will read; give --text FILE, of 200 kB or more")


def _windows(tokenizer: Tokenizer, texts: Sequence[Path], method: str) -> tuple[list[Tensor], list[Tensor]]:
    """What perplexity is measured on, and what is calibrated with."""
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    windows: list[Tensor] = []
    for path in texts or (PAGE,):
        try:
            ids = tokenizer.encode(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {path} is no text in UTF-8 ({error}); give a file of plain text") from error
        pieces = (ids[at : at + WINDOW - len(start)] for at in range(0, len(ids), WINDOW - len(start)))
        windows += [torch.tensor(start + piece) for piece in pieces if len(piece) > 1]
    least = 5 if method == "gptq" else 1
    if len(windows) < least:
        raise UserError(f"--text holds {len(windows)} windows of {WINDOW} tokens; give at least {least}, better 40")
    if method != "gptq":
        return _spread(windows, MEASURE), []
    rest = [window for place, window in enumerate(windows) if place % 5 != 4]
    return _spread(windows[4::5], MEASURE), _spread(rest, CALIBRATE)


def _spread(windows: list[Tensor], tokens: int) -> list[Tensor]:
    """At most so many tokens, taken evenly."""
    count = min(len(windows), tokens // WINDOW)
    return [windows[place * len(windows) // count] for place in range(count)]


def _licence(folder: Path) -> str | None:
    """What the card of the source says."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if folder.is_dir() and card.exists() else ""
    found = re.search(r"^licen[cs]e: ([\w.+-]*\w)", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None
