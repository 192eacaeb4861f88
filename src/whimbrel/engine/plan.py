"""Will it fit, and how fast could it be at best? Bytes and floors of serving a model, from its config alone.

Nothing is built and nothing is allocated. The sizes are those of our own engine: weights as loaded, keys and values in
blocks, recurrent state in slots, the temporary tensors of `ops/torch`. docs/plan.md derives each line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from whimbrel.engine.memory import SHARE, Room
from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.config import ATTENTION, FEED_FORWARD, LETTERS, MAMBA, ModelConfig
from whimbrel.units import format_bytes, format_count

BLOCK = 16
"""Tokens of a block of keys and values (the engine's default)."""


@dataclass(frozen=True)
class Plan:
    """What serving takes, and the floors no engine can beat with these bytes. Sizes in bytes, times in seconds."""

    model: str
    pattern: str
    parameters: int
    dtype: str
    kv_dtype: str
    state_dtype: str
    memory: int
    context: int
    batch: int
    weights_bytes: int
    kv_bytes: int
    """Keys and values of `batch` full contexts, in whole blocks."""
    state_bytes: int
    """Recurrent state (`state_dtype`) and convolution tails of `batch` sequences."""
    activation_bytes: int
    """Temporary tensors of one chunk of a prompt at the end of the context."""
    buffer_bytes: int
    """Temporary tensors of a decoding step of `batch` sequences: states in hand, logits, sampling."""
    reserve_bytes: int
    """Kept free for everything else: the runtime, other programs, fragmentation."""
    total_bytes: int
    fits: bool
    largest_batch: int
    """Sequences that fit if each is given room for its whole context when it is admitted: none ever waits again."""
    largest_batch_on_demand: int
    """Sequences that fit if blocks are taken as tokens come, and contexts are half full on average (they start empty
    and at different times). When they grow past that, the engine sends some back to wait.
    """
    default_sequences: int
    """Sequences that an engine on a GPU makes room for by itself, beside weights and reserve; 0: not one fits."""
    default_kv_tokens: int
    """Tokens of keys and values of all of them."""
    largest_context: int | None
    """Of a single sequence; None without attention, where memory does not depend on the context."""
    decode_bytes: int
    """Bytes that move for one token of one sequence at the full context."""
    decode_bytes_largest: int
    """The same for one token of each of `largest_batch` sequences; 0 if nothing fits."""
    decode_tokens_per_second: float | None
    decode_tokens_per_second_largest: float | None
    """All sequences together."""
    prefill_flops: float
    prefill_seconds: float | None
    """To read a prompt as long as the context."""
    bandwidth: float | None
    peak: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for people."""
        warnings = (f"  warning: {text}" for text in self.warnings)
        return [*_head(self), "", *_sizes(self), "", *_limits(self), *_floors(self), *warnings]


def plan(
    config: ModelConfig,
    *,
    memory: int,
    context: int,
    batch: int = 1,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    bandwidth: float | None = None,
    peak: float | None = None,
    reserve: int = 0,
    prefill_tokens: int = 512,
    state_dtype: str = "float32",
    name: str = "model",
) -> Plan:
    """Plan to serve `batch` sequences of `context` tokens in `memory` bytes.

    `bandwidth` bytes/s and `peak` FLOP/s of the device give the floors; without them there are none. `prefill_tokens`
    is the engine's share of prompts in one step. Raises UserError for numbers below 1 and unknown dtypes.
    """
    for setting, value in (
        ("memory", memory),
        ("context", context),
        ("batch", batch),
        ("prefill_tokens", prefill_tokens),
    ):
        if value < 1:
            works = {"memory": "22GiB", "context": min(8192, config.max_position_embeddings)}.get(setting, 1)
            raise UserError(f"{setting} is {value}; set {setting} to 1 or more, for example {works}")
    kv_dtype = kv_dtype or count.computed(dtype)
    need = _Need(config, dtype, kv_dtype, prefill_tokens, reserve, state_dtype)
    total, room = need.fixed(context) + batch * need.sequence(context), max(0, memory - need.fixed(context))
    largest = room // need.sequence(context)
    return Plan(
        model=name,
        pattern=config.pattern,
        parameters=count.total(config),
        dtype=dtype,
        kv_dtype=kv_dtype,
        state_dtype=state_dtype,
        memory=memory,
        context=context,
        batch=batch,
        weights_bytes=need.weights,
        kv_bytes=batch * need.kv(context),
        state_bytes=count.state_bytes(config, batch, dtype, state_dtype),
        activation_bytes=need.activations(context),
        buffer_bytes=batch * count.step_bytes(config, dtype),
        reserve_bytes=reserve,
        total_bytes=total,
        fits=total <= memory,
        largest_batch=largest,
        largest_batch_on_demand=room // need.sequence(-(-context // 2)) if largest else 0,
        bandwidth=bandwidth,
        peak=peak,
        warnings=_beyond(config, context),
        **need.own(memory),
        **_floor(need, context, largest, bandwidth, peak),
    )


def serving_bytes(config: ModelConfig, context: int, batch: int = 1, dtype: str = "bfloat16") -> int:
    """`total_bytes` of a plan with nothing kept free, for those who look at thousands of shapes."""
    need = _Need(config, dtype, count.computed(dtype), 512, 0, "float32")
    return need.fixed(context) + batch * need.sequence(context)


def _floor(need: _Need, context: int, largest: int, bandwidth: float | None, peak: float | None) -> dict[str, Any]:
    """The fields of a plan that are about speed."""
    alone = count.decode_bytes(need.config, context, 1, need.dtype, need.kv_dtype, need.state_dtype)
    together = (
        count.decode_bytes(need.config, context, largest, need.dtype, need.kv_dtype, need.state_dtype)
        if largest
        else {}
    )
    one, all_ = sum(alone.values()), sum(together.values())
    flops, prompt = count.flops_per_token(need.config, context), prompt_flops(need.config, context)
    read = -(-context // need.prefill_tokens) * alone["weights"]
    return {
        "decode_bytes": one,
        "decode_bytes_largest": all_,
        "decode_tokens_per_second": _rate(1, one, flops, bandwidth, peak),
        "decode_tokens_per_second_largest": _rate(largest, all_, largest * flops, bandwidth, peak),
        "prefill_flops": prompt,
        "prefill_seconds": _seconds(read, prompt, bandwidth, peak) if peak else None,
    }


@dataclass(frozen=True)
class _Need:
    """Bytes as functions of the context: what is there once, and what each sequence adds."""

    config: ModelConfig
    dtype: str
    kv_dtype: str
    prefill_tokens: int
    reserve: int
    state_dtype: str

    @property
    def weights(self) -> int:
        return count.weights_bytes(self.config, self.dtype)

    def activations(self, context: int) -> int:
        return count.activation_bytes(self.config, min(self.prefill_tokens, context), context, self.dtype)

    def fixed(self, context: int) -> int:
        return self.weights + self.activations(context) + self.reserve

    def kv(self, context: int) -> int:
        return count.kv_bytes(self.config, -(-context // BLOCK) * BLOCK, 1, self.kv_dtype)

    def sequence(self, context: int) -> int:
        state = count.state_bytes(self.config, 1, self.dtype, self.state_dtype)
        return self.kv(context) + state + count.step_bytes(self.config, self.dtype)

    def own(self, memory: int) -> dict[str, Any]:
        """The fields of a plan that an engine chooses if it is told neither, and the largest context."""
        name, free = count.computed(self.dtype), int((memory - self.weights - self.reserve) * SHARE["cuda"])
        room = Room(self.config, free, name, self.state_dtype, BLOCK, self.prefill_tokens)
        sequences, kv_tokens = room.divide(None, None) if room.most(each=1) else (0, 0)
        more = {"largest_context": self.largest_context(memory)}
        return more | {"default_sequences": sequences, "default_kv_tokens": kv_tokens}

    def largest_context(self, memory: int) -> int | None:
        """Of one sequence, in whole blocks, by halving: the need grows with the context."""
        a_block = self.kv(BLOCK)
        if not a_block:
            return None
        low, high = 0, memory // a_block + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.fixed(middle * BLOCK) + self.sequence(middle * BLOCK) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return low * BLOCK


def prompt_flops(config: ModelConfig, context: int) -> float:
    """Operations to read a prompt: all tokens through what others see, the last alone through the rest and the head."""
    before = config.pattern.rstrip(FEED_FORWARD) or config.pattern
    mean = count.mean_context([context])
    whole, early = (count.flops(replace(config, pattern=pattern), mean) for pattern in (config.pattern, before))
    wide = {MAMBA: 2 * config.mamba_inner, ATTENTION: config.num_attention_heads * config.head_dim}  # gate and output
    own = early["head"] + 2 * config.hidden_size * wide.get(before[-1], 0)
    return sum(whole.values()) + (context - 1) * (sum(early.values()) - own)


def _seconds(bytes_: float, flops: float, bandwidth: float | None, peak: float | None) -> float:
    """The longer of moving the bytes and doing the arithmetic; a figure that is not given does not bind."""
    return max(bytes_ / bandwidth if bandwidth else 0.0, flops / peak if peak else 0.0)


def _rate(tokens: int, bytes_: int, flops: float, bandwidth: float | None, peak: float | None) -> float | None:
    return tokens / _seconds(bytes_, flops, bandwidth, peak) if tokens and bandwidth else None


def _beyond(config: ModelConfig, context: int) -> tuple[str, ...]:
    trained = config.max_position_embeddings
    if context <= trained:
        return ()
    return (
        f"{context:,} tokens are more than the model was made for (max_position_embeddings={trained:,}); "
        "answers may degrade",
    )


# ---------------------------------------------------------------------------------------------------------- for people


def _head(plan: Plan) -> list[str]:
    kinds = ", ".join(
        f"{plan.pattern.count(letter)} {word}" for letter, word in LETTERS.items() if letter in plan.pattern
    )
    return [f"{plan.model}: {format_count(plan.parameters)} parameters in {len(plan.pattern)} layers ({kinds})"]


def _sizes(plan: Plan) -> list[str]:
    sequences = "1 sequence" if plan.batch == 1 else f"{plan.batch:,} sequences"
    rows = [
        ("weights", plan.weights_bytes, plan.dtype),
        ("keys and values", plan.kv_bytes, f"{plan.context:,} tokens for {sequences}, {plan.kv_dtype}"),
        ("recurrent state", plan.state_bytes, f"{sequences}, {plan.state_dtype}"),
        ("activations", plan.activation_bytes, "while a prompt is read"),
        ("buffers", plan.buffer_bytes, "of a decoding step"),
        ("reserve", plan.reserve_bytes, "kept free"),
    ]
    lines = [f"  {name:<16} {format_bytes(size):>11}  {what}" for name, size, what in rows if size]
    spare = plan.memory - plan.total_bytes
    verdict = f"fits, {format_bytes(spare)} to spare" if plan.fits else f"does not fit, {format_bytes(-spare)} too much"
    return [*lines, f"  {'total':<16} {format_bytes(plan.total_bytes):>11}  of {format_bytes(plan.memory)}: {verdict}"]


def _limits(plan: Plan) -> list[str]:
    context = "any" if plan.largest_context is None else f"{plan.largest_context:,} tokens"
    return [
        f"  largest batch    {plan.largest_batch:,} with whole contexts reserved, "
        f"{plan.largest_batch_on_demand:,} paged on demand (contexts half full)",
        f"  largest context  {context} for one sequence",
        f"  engine           on a GPU, by itself: {plan.default_sequences:,} at once, "
        f"{plan.default_kv_tokens:,} tokens of keys and values",
    ]


def _floors(plan: Plan) -> list[str]:
    lines = []
    if plan.decode_tokens_per_second and plan.bandwidth:
        text = f"  decoding         at most {plan.decode_tokens_per_second:,.4g} tokens/s for one sequence"
        if plan.decode_tokens_per_second_largest and plan.largest_batch > 1:
            text += f", {plan.decode_tokens_per_second_largest:,.4g} for {plan.largest_batch:,} together"
        lines.append(f"{text}, at {plan.bandwidth / 1e9:,.4g} GB/s")
    if plan.prefill_seconds and plan.peak:
        seconds = f"{plan.prefill_seconds:,.3g} s"
        lines.append(f"  a full prompt    at least {seconds}, at {plan.peak / 1e12:,.4g} TFLOP/s")
    return lines
