"""The stage `grpo`: several answers to a prompt, judged by its verifier; what beats its group becomes likelier.

One flat loop over `train_step`, with an engine on the same parameters. A step draws a group of answers to each of some
prompts, scores the learned tokens with the trainer's own pass, compares that with what the engine drew with, and stops
the run where the two differ: then sampler and trainer are no longer one model. Learned are the tokens that the model
chose: not those by which the engine closed a thought, and not those of answers that were cut at `max_tokens`.

Several processes have an engine each: a step's prompts are dealt to all of them, answers are gathered, and each copy of
the model learns from a part of them; the step is the one that a single process would make. Where the model is cut
(`fsdp`, `tensor`) an engine has whole weights of its own, gathered tensor by tensor after each step.

OUT/model/, OUT/metrics.jsonl, OUT/checkpoints/   as of `pretrain`, and resumed in the same way
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whimbrel.align.policy import PolicyBatch, PolicyGradient, advantages, log_probs
from whimbrel.align.rollout import Sample, accuracy, pack, read_prompts, reward
from whimbrel.align.tuning import check_axes, check_counts, check_shares, load
from whimbrel.data.order import Permutation
from whimbrel.engine import Engine, Sampling
from whimbrel.engine.prompt import read_prompt
from whimbrel.errors import UserError, nearest
from whimbrel.events import Report, silent
from whimbrel.model import LanguageModel
from whimbrel.model.checkpoint import resolve
from whimbrel.parallel import Share, applied, gathered
from whimbrel.parallel.mesh import ALONE
from whimbrel.text import Tokenizer
from whimbrel.train import checkpointing, threads
from whimbrel.train.checkpointing import TrainState
from whimbrel.train.interrupt import Stopped, stop_politely
from whimbrel.train.loop import TrainSettings, book, identity
from whimbrel.train.optimizer import adamw, set_learning_rate
from whimbrel.train.stages import check_device, torch_device
from whimbrel.train.step import autocast, train_step

Row = Mapping[str, Any]
KINDS = ("none", "k1", "k2", "k3")


class Flat(TrainSettings):
    """The loop's settings. Micro-batches are made of what was drawn, so there is no fixed number to deal out."""

    def check_batches(self) -> None:
        """Any number of copies will do."""


@dataclass(frozen=True)
class GrpoSettings:
    """Group-relative policy optimisation. Tokens are drawn from the model's own distribution, whole and at
    temperature 1, because that is the one whose gradient is taken."""

    groups: int = 32
    """Prompts of a step."""
    group_size: int = 8
    """Answers to each."""
    max_tokens: int = 512
    """Tokens of an answer at most, thought included."""
    thinking_budget: int | None = None
    """Tokens of a thought at most; null: no limit."""
    thinking_grace: int = 500
    off: float = 0.0
    """Share of the prompts that are answered without a thought."""
    leave_one_out: bool = True
    """Compare an answer with the mean of the others, not of the whole group."""
    normalise: bool = False
    """Divide by the standard deviation of the group's rewards."""
    updates: int = 1
    """Optimizer steps on the answers of a step, each on a part of the groups."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """The ratio to the drawing model counts up to 1 - clip_low and 1 + clip_high."""
    kl: str = "none"
    """Estimator of the divergence from the model at the start: none, k1, k2 or k3."""
    kl_coefficient: float = 0.0
    """Its weight in the loss; 0 only measures it."""
    learn_cut: bool = False
    """Learn from answers that were cut at max_tokens, too."""
    drift_mean: float = 0.05
    drift_max: float = 1.0
    """Largest |log p of the engine - log p of the trainer| with which the run goes on: mean, and of one token."""
    micro_tokens: int = 16384
    """Tokens of a micro-batch; changes memory and rounding, not the loss."""
    validation_prompts: int = 256
    seed: int = 0
    device: str = "auto"
    train: Flat = field(default_factory=lambda: Flat(steps=100, validate_every=50))

    def __post_init__(self) -> None:
        check_counts(self, "groups", "max_tokens", "updates", "micro_tokens", "validation_prompts")
        if self.group_size < 2:
            raise UserError(f"group_size is {self.group_size}, with nothing to compare; set group_size to 2 or more")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise UserError(f"clip_low is {self.clip_low}, clip_high {self.clip_high}; set them to 0.2 and 0.28")
        if self.updates > self.groups:
            raise UserError(f"updates is {self.updates}, more than groups {self.groups}; set updates to 1")
        if self.kl not in KINDS:
            raise UserError(f"kl is {self.kl!r}; {nearest(self.kl, KINDS)}")
        if self.kl_coefficient < 0 or (self.kl_coefficient and self.kl in ("none", "k1")):
            why = "nothing is measured" if self.kl == "none" else "the gradient of k1 is 0 in the mean"
            raise UserError(f"kl_coefficient is {self.kl_coefficient} with kl {self.kl}: {why}; set kl to k3")
        if self.thinking_budget == 0:
            raise UserError("thinking_budget is 0, which turns thinking off; leave it at null and set off to 1")
        if self.train.accumulate != 1 or self.train.recompute:
            raise UserError("train.accumulate and train.recompute are not for grpo; set micro_tokens lower instead")
        check_axes(self, "answers are not cut", "context")
        if (copies := self.train.parallel.copies) > self.groups:
            raise UserError(
                f"train.parallel makes {copies} copies (data × fsdp), more than groups {self.groups}; set groups to "
                f"{copies}"
            )
        check_shares(self, "off")
        check_device(self.device)

    def sampling(self, seed: int, thinking: bool) -> Sampling:
        """What the engine is asked for, for one prompt."""
        budget = self.thinking_budget if thinking else 0
        grace, size = self.thinking_grace, self.group_size
        return Sampling(
            self.max_tokens, 1.0, seed=seed, logprobs=0, n=size, thinking_budget=budget, thinking_grace=grace
        )


def draw(
    settings: GrpoSettings, step: int, rows: Sequence[Row], engine: Engine, share: Share = ALONE
) -> tuple[list[list[Sample]], dict[str, float]]:
    """The groups of a step that have something to teach, and figures of all of them. Pure in the weights and the step.

    An answer that is left out still counts in the mean of its group. Of several ranks each draws for a part of the
    prompts; all get all groups.
    """
    first, size = step * settings.groups, settings.group_size
    mine = share.dealt(settings.groups)
    chosen = [rows[i] for i in Permutation(len(rows), settings.seed)(first + np.asarray(mine)).tolist()]
    thinks = (np.random.default_rng([settings.seed, step]).random(settings.groups) >= settings.off)[mine].tolist()
    vocabulary = engine.model.config.vocab_size
    prompts = [read_prompt(row["prompt"], engine.tokenizer, on, vocabulary)[0]
               for row, on in zip(chosen, thinks, strict=True)]  # fmt: skip
    requests = [settings.sampling((settings.seed << 40) + first + i, on) for i, on in zip(mine, thinks, strict=True)]
    answers = list(engine.generate(prompts, requests))
    groups, earned = dict[int, list[Sample]](), 0.0
    for number, row in enumerate(chosen):
        group = answers[number * size : (number + 1) * size]
        rewards = [reward(row, answer) for answer in group]
        earned += sum(rewards)
        gains = advantages(rewards, settings.leave_one_out, settings.normalise)
        if gains is not None:
            kept = [Sample(prompts[number], answer, gain) for answer, gain in zip(group, gains, strict=True)
                    if settings.learn_cut or answer.finish != "length"]  # fmt: skip
            groups[mine[number]] = kept
    sums = {
        "reward": earned,
        "groups_kept": len(groups) * size,
        "cut": sum(answer.finish == "length" for answer in answers),
        "answer_tokens": sum(len(answer.ids) for answer in answers),
        "thinking_tokens": sum(answer.thinking_tokens for answer in answers),
    }
    figures = {name: value / (settings.groups * size) for name, value in share.total(sums, tuple(share.place)).items()}
    every = {number: group for part in share.collect(groups) for number, group in part.items()}
    return [every[number] for number in sorted(every)], figures


class Trainer:
    """A policy, the engine that draws from it, and a frozen reference if the divergence from it is asked for.

    The engine computes with the policy itself, or with `drawer`, a whole model, where the policy is cut.
    """

    def __init__(
        self,
        settings: GrpoSettings,
        model: LanguageModel,
        tokenizer: Tokenizer,
        reference: LanguageModel | None,
        drawer: LanguageModel | None = None,
    ) -> None:
        self.settings, self.model, self.reference = settings, model, reference
        prompts = -(-settings.groups // settings.train.parallel.processes)
        self.engine = Engine(drawer or model, tokenizer, max_sequences=prompts * settings.group_size)
        self.engine.prefill_tokens = settings.micro_tokens
        self.optimizer = adamw(model, settings.train.optimizer)
        self.precision = settings.train.precision_on(model.device)
        self.objective = PolicyGradient(settings.clip_low, settings.clip_high, settings.kl, settings.kl_coefficient)

    def step(self, step: int, rows: Sequence[Row]) -> dict[str, float]:
        """Draw, score, learn; returns figures. UserError, with the weights untouched, where the engine has drifted."""
        settings, start = self.settings, time.perf_counter()
        groups, figures = draw(settings, step, rows, self.engine, self.share)
        middle = time.perf_counter()
        rate = settings.train.optimizer.learning_rate * settings.train.schedule.share(step, settings.train.steps)
        set_learning_rate(self.optimizer, rate)
        parts = [[sample for group in groups[part :: settings.updates] for sample in group]
                 for part in range(settings.updates)]  # fmt: skip
        dealt = [self.deal(part) for part in parts]
        scored = [([self.score(batch) for batch in batches], idle) for batches, idle in dealt]
        figures |= self.drift([batch for batches, idle in scored for batch in batches[: len(batches) - idle]])
        for batches, idle in scored:
            if batches:
                seen = train_step(self.model, self.objective, batches, self.optimizer, clip=settings.train.clip,
                                  precision=self.precision, idle=idle)  # fmt: skip
                figures |= seen.terms | {"loss": seen.loss, "grad_norm": seen.grad_norm}
        self.hand_over()
        now = time.perf_counter()
        return figures | {"learning_rate": rate, "seconds_drawing": middle - start, "seconds_learning": now - middle}

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the weights of now to an engine that has its own; all ranks call it."""
        if self.engine.model is not self.model:
            held = self.engine.model.state_dict()
            for name, tensor in gathered(self.model, self.share):
                held[name].copy_(tensor)
            self.engine.model.touch()

    @property
    def share(self) -> Share:
        """The ranks that learn together."""
        return self.model.share or ALONE

    def deal(self, samples: Sequence[Sample]) -> tuple[list[PolicyBatch], int]:
        """This rank's micro-batches of an update, as many on every rank; the last so many only keep step."""
        copies = self.share.axes.copies
        every = [pack(samples[copy::copies], self.settings.micro_tokens) for copy in range(copies)]
        mine, spare = every[self.share.copy], next((batches[0] for batches in every if batches), None)
        idle = max(map(len, every)) - len(mine)
        return mine + [spare] * idle if spare is not None else [], idle

    @torch.no_grad()
    def score(self, batch: PolicyBatch) -> PolicyBatch:
        """The batch with log-probabilities of the trainer's own pass, and of the reference."""
        chunk = self.objective.chunk
        with autocast(self.model.device, self.precision):
            batch = replace(batch, old_R=log_probs(self.model, batch, chunk).float().cpu().numpy())
            if self.reference is not None:
                batch = replace(batch, reference_R=log_probs(self.reference, batch, chunk).float().cpu().numpy())
        return batch

    def drift(self, batches: Sequence[PolicyBatch]) -> dict[str, float]:
        """Mean and largest distance between the engine's and the trainer's log-probabilities, over all ranks."""
        away = [np.abs(batch.sampler_R - batch.old_R) for batch in batches if batch.old_R is not None]
        away_R = np.concatenate([*(part for some in self.share.collect(away) for part in some), np.zeros(0)])
        if not len(away_R):
            return {"drift_mean": 0.0, "drift_max": 0.0}
        found = {"drift_mean": float(away_R.mean()), "drift_max": float(away_R.max())}
        for name, value in found.items():
            if not value <= getattr(self.settings, name):
                raise UserError(
                    f"{name} is {value:.3g}, its limit {getattr(self.settings, name):g}: the engine no longer draws "
                    f"from the model that is trained, and nothing was learned; raise {name} only if you know why"
                )
        return found


def grpo(
    settings: GrpoSettings,
    rows: Sequence[Row],
    validation: Sequence[Row],
    trainer: Trainer,
    folder: Path,
    report: Report,
) -> dict[str, Any]:
    """Train in place; returns the last figures. Resumes from `folder` bit for bit, as `train.loop.train` does."""
    how, model, checkpoints = settings.train, trainer.model, folder / "checkpoints"
    mine = {name: value for name, value in asdict(settings).items() if name not in ("train", "device")}
    said = identity(how, trainer.precision, trainer.objective, model) | {"grpo": mine | {"rows": len(rows)}}
    share = trainer.share
    found = share.once(lambda: checkpointing.newest(checkpoints, report))
    if found is not None:
        checkpointing.refuse_changes(found[0], found[1].identity, said)
        checkpointing.load(found[0], model, trainer.optimizer)
        model.touch()
        trainer.hand_over()
        report({"event": "log", "text": f"going on from {found[0]}"})
    with stop_politely() as wish, ExitStack() as stack:
        used = threads.choose(how.threads, found[1].threads if found else None, lambda: _trial(model), report, share)
        state = replace(found[1], threads=used) if found else TrainState(0, used, said)
        stack.enter_context(threads.using(used))
        log = stack.enter_context(closing(book(folder, state, how, share, report)))
        figures, judged = state.figures, dict[str, float]()
        for step in range(state.step, how.steps + 1):
            if validation and (step % how.validate_every == 0 or step == how.steps):
                judged = judge(settings, trainer.engine, validation, share)
                log.write({"step": step} | judged)
            if step == how.steps:
                break
            figures = {"step": step + 1} | trainer.step(step, rows)
            log.write(figures)
            text = f"reward {figures['reward']:.3f} · drift {figures['drift_max']:.1e}"
            report({"event": "progress", "done": step + 1, "total": how.steps, "unit": "steps", "text": text})
            signal = wish.signal  # read once: it may come at any moment
            stop = share.any(signal is not None)
            if stop or (step + 1) % how.checkpoint_every == 0 or step + 1 == how.steps:
                here = replace(state, step=step + 1, metrics_offset=log.sync(), figures=figures)
                path = checkpointing.save(checkpoints, here, model, trainer.optimizer, how.keep)
                if stop:
                    raise Stopped(
                        f"{signal or 'a signal'}: stopped after step {step + 1}, saved {path}; the same command goes on"
                    )
    return figures | judged | {"threads": used}


def judge(settings: GrpoSettings, engine: Engine, rows: Sequence[Row], share: Share = ALONE) -> dict[str, float]:
    """Greedy accuracy with and without a thought."""
    limits = replace(settings.sampling(0, True), temperature=0.0, n=1, logprobs=None)
    return {
        "accuracy": accuracy(engine, rows, limits, share),
        "accuracy_off": accuracy(engine, rows, replace(limits, thinking_budget=0), share),
    }


def limit(engine: Engine, rows: Sequence[Row], max_tokens: int) -> None:
    """Room for the longest prompt and answer in every slot, and no more: by itself an engine takes what a device has
    free, and here gradients, moments and activations come later.
    """
    vocabulary, size = engine.model.config.vocab_size, engine.block_size
    longest = max(len(read_prompt(row["prompt"], engine.tokenizer, on, vocabulary)[0])
                  for row in rows for on in (True, False))  # fmt: skip
    sequences, most = engine.sizes()
    engine.kv_tokens = min(most, sequences * -(-(longest + max_tokens) // size) * size)


@torch.no_grad()
def _trial(model: LanguageModel) -> None:
    model(torch.zeros(8, 64, dtype=torch.int64, device=model.device))


def run(settings: GrpoSettings, inputs: Mapping[str, Path], out: Path, report: Report) -> dict[str, Any]:
    """Train the input `model` on the input `prompts`, judged on the input `validation` if it is given."""
    axes = settings.train.parallel
    device = Share.meet(axes, torch_device(settings.device)).device
    rows = read_prompts(inputs["prompts"], "prompts")
    held = read_prompts(inputs["validation"], "validation") if "validation" in inputs else []
    model, tokenizer = load(inputs["model"], device)
    with applied(model, axes) as share, ExitStack() as stack:
        reference = drawer = None
        if settings.kl != "none":
            reference = load(inputs["model"], device)[0].requires_grad_(False)
            stack.enter_context(applied(reference, axes))
        if axes.fsdp * axes.tensor > 1:
            drawer = load(inputs["model"], device)[0].requires_grad_(False)
        trainer = Trainer(settings, model, tokenizer, reference, drawer)
        told, held = report if share.first else silent, held[: settings.validation_prompts]
        limit(trainer.engine, [*rows, *held], settings.max_tokens)
        figures = grpo(settings, rows, held, trainer, out, told)
    model.save(out / "model", resolve(inputs["model"]))
    return figures
