"""Distillation: a student learns the teacher's distribution of the next token at every labelled place of a batch.

Forward KL at temperature 1 on logits alone, as in Minitron (arXiv 2407.14679, section 2.4) and Nemotron Nano 2 (arXiv
2508.14444, section 4). Any batch with targets will do: pages, or conversations with masks.

R labelled rows, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import numpy as np
import torch

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model.checkpoint import probe
from whimbrel.model.language import LanguageModel
from whimbrel.train.objective import IGNORE, Batch, CrossEntropy, Term, layout_of


@dataclass(frozen=True)
class Distillation:
    """(1 - labels) * KL(teacher || student) + labels * cross-entropy. The teacher is frozen by being given here.

    With labels 1 the teacher is not run: the control, at the price of plain training.
    """

    teacher: InitVar[LanguageModel]
    labels: float = 0.0
    """Weight of the labels, from 0 (the teacher alone) to 1 (the labels alone)."""
    chunk: int = 1024
    """Rows whose logits exist at a time."""
    teacher_probe: tuple[float, ...] = field(init=False)
    """A few logits by which a run that goes on knows its teacher again."""

    def __post_init__(self, teacher: LanguageModel) -> None:
        assert 0 <= self.labels <= 1
        object.__setattr__(self, "_teacher", teacher.eval().requires_grad_(False))
        object.__setattr__(self, "teacher_probe", tuple(probe(teacher)))

    def counts(self, batch: Batch) -> dict[str, int]:
        """Labelled tokens, for each term that has a weight."""
        labelled = CrossEntropy().counts(batch)["loss"]
        return {name: labelled for name, weight in (("kl", 1 - self.labels), ("labels", self.labels)) if weight}

    def __call__(self, model: LanguageModel, batch: Batch) -> dict[str, Term]:
        """The terms `kl` (summed, in nats) and `labels` (summed cross-entropy); one of weight 0 is left out."""
        teacher: LanguageModel = self.__dict__["_teacher"]
        if model.config.vocab_size != teacher.config.vocab_size:
            raise UserError(
                f"the student knows {model.config.vocab_size} entries, the teacher {teacher.config.vocab_size}; "
                "set student to a model cut out of this teacher"
            )
        counts = self.counts(batch)
        labelled_R = np.flatnonzero(batch.targets_T != IGNORE)
        rows_R = torch.from_numpy(labelled_R).to(model.device)
        tokens_T = torch.from_numpy(batch.tokens_T).to(model.device)
        targets_R = torch.from_numpy(batch.targets_T[labelled_R]).to(model.device)
        hidden_RD = model(tokens_T, layout_of(batch, model.device, rows_R))
        terms = {}
        if "kl" in counts:
            with torch.no_grad():
                teacher_RD = teacher(tokens_T, layout_of(batch, model.device, rows_R))
            kl_R = teacher.head(
                teacher_RD,
                lambda wise, wise_VD: model.head(hidden_RD, lambda h, w: ops.kl(h, w, wise, wise_VD, self.chunk)),
            )
            terms["kl"] = Term(kl_R.sum(), counts["kl"], 1 - self.labels)
        if "labels" in counts:
            loss_R = model.head(hidden_RD, lambda h, w: ops.cross_entropy(h, w, targets_R, self.chunk))
            terms["labels"] = Term(loss_R.sum(), counts["labels"], self.labels)
        return terms
