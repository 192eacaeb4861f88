"""Nothing leaks: not in thousands of steps of decoding, not while sequences come and go, not in training operations.

Held to what malloc has given out (64 KiB: less than 7 bytes a step in 10,000 steps) and to what is resident (4 MiB).
"""

import ctypes

import pytest
import torch
from held import assert_nothing_more, held
from test_decode import NETWORKS, random_model
from test_native import scan_of_slices

from whimbrel import Engine, Sampling, Tokenizer
from whimbrel.model import Layout, State
from whimbrel.ops import cpu
from whimbrel.ops.segments import Segments

pytestmark = pytest.mark.skipif(cpu.load()[0] is None, reason="the native library is not built here")


def test_a_leak_is_seen():
    before, libc = held(), ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    lost = [libc.malloc(ctypes.c_size_t(24)) for _ in range(10_000)]
    with pytest.raises(AssertionError, match="malloc holds"):
        assert_nothing_more(before)
    for address in lost:
        libc.free(ctypes.c_void_p(address))


class Traffic:
    """Four places for sequences of a small hybrid, step after step; one leaves and another comes every few steps."""

    def __init__(self, bits):
        self.model = random_model(NETWORKS["hybrid"], bits)
        self.blocks = 12
        room = {"slots": 4, "blocks": 4 * self.blocks, "block_size": 16}
        self.state = State.empty(self.model.config, **room, kv_dtype=torch.float16 if bits < 32 else torch.float32)
        self.table = torch.randperm(4 * self.blocks).view(4, -1)
        self.past, self.step = [0, 0, 0, 0], 0

    @torch.inference_mode()
    def run(self, steps):
        for step in range(self.step, self.step + steps):
            if step % 7 == 0:
                self.enter(step // 7 % 4, 1 + step * 31 % 90)
            here = [s for s in range(4) if self.past[s] and (s == 0 or (s + step // 50) % 4)]
            layout = Layout.of(
                [1] * len(here), [self.past[s] for s in here], slots=torch.tensor(here), block_table=self.table[here]
            )
            tokens = torch.tensor([(step + s) % 50 for s in here])
            assert torch.isfinite(self.model.head(self.model(tokens, layout, self.state))).all()
            for s in here:
                self.past[s] = min(self.past[s] + 1, 16 * self.blocks - 1)
        self.step += steps

    def enter(self, slot, length):
        layout = Layout.of([length], [0], slots=torch.tensor([slot]), block_table=self.table[[slot]])
        self.model(torch.arange(length) % 50, layout, self.state)
        self.past[slot] = length


def traffic(bits, steps):
    going = Traffic(bits)
    going.run(500)
    before = held()
    going.run(steps)
    assert going.model.decoder.step is not None, "it ran natively"
    assert_nothing_more(before)


@pytest.mark.parametrize("bits", [32, 4])
def test_a_few_hundred_steps_leak_nothing(bits):
    traffic(bits, 300)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_ten_thousand_steps_leak_nothing(bits):
    traffic(bits, 10_000)


def talk(rounds):
    """The engine answers prompts of every length, up to four at once, again and again."""
    text = "the whimbrel crosses an ocean and rests on the far side of it " * 3
    tokenizer = Tokenizer.train([text], 320)
    config = NETWORKS["hybrid"]
    model = random_model(type(config)(**{**vars(config), "vocab_size": 320}), 4)
    engine = Engine(model, tokenizer, max_sequences=4, kv_tokens=1024, report=lambda event: None)
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=1)
    prompts = [text[: 5 + 17 * n] for n in range(10)]
    list(engine.generate(prompts, sampling))
    list(engine.generate(prompts, sampling))
    before, steps = held(), 0
    for _ in range(rounds):
        steps += sum(len(answer.ids) for answer in engine.generate(prompts, sampling))
    assert_nothing_more(before)
    return steps


def test_an_engine_leaks_nothing():
    assert talk(4) > 400


@pytest.mark.slow
def test_an_engine_that_runs_for_long_leaks_nothing():
    assert talk(100) > 10_000


def test_training_operations_leak_nothing():
    def work(times):
        for _ in range(times):
            leaves = [v.detach().clone().requires_grad_() for v in scan_of_slices(tokens=130)]
            y = cpu.ssd(*leaves, Segments.of([60, 70]))[0]
            y = cpu.conv(y.flatten(1), torch.ones(64, 4), None, Segments.of([130]))[0]
            cpu.gated_norm(y, y, torch.ones(64), 2, 1e-5).sum().backward()

    work(100)
    before = held()
    work(400)
    assert_nothing_more(before)
