"""Who computes next: each step carries every running answer on by one token, then fills its room with prompts."""

from __future__ import annotations

from collections import deque

from whimbrel.engine.pool import Pool
from whimbrel.engine.sequence import Sequence

Work = list[tuple[Sequence, int]]


class Scheduler:
    """Continuous batching: finished sequences leave, waiting ones enter, in order of arrival.

    A step computes at most `prefill_tokens` tokens of prompts beside one token of each running answer. When the blocks
    run out, the youngest running sequence gives up its state, waits in front, and is computed again later from its
    tokens.
    """

    def __init__(self, pool: Pool, prefill_tokens: int) -> None:
        self.pool, self.prefill_tokens = pool, prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival: what gives way is always the last, and comes back before anything younger."""

    @property
    def busy(self) -> bool:
        """Is anything waiting or running?"""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves, finished or not."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Work:
        """The next step: (sequence, tokens to compute), answers that continue by one token first."""
        work: Work = []
        for sequence in list(self.running):
            if sequence.slot is not None and sequence.cached and sequence.pending == 1 and self._grow(sequence):
                work.append((sequence, 1))
        room = self.prefill_tokens
        taken = {id(sequence) for sequence, _ in work}
        for sequence in self.running:
            if id(sequence) not in taken and room:
                room -= self._chunk(work, sequence, room)
        # Nearly full: a few prompts together cost little more than one, so they wait for each other, not for all.
        together = self.pool.free_slots >= min(len(self.waiting), self.pool.slots // 16)
        while together and room and self.waiting and self.pool.admit(self.waiting[0], spare=len(self.running)):
            sequence = self.waiting.popleft()
            sequence.begin()
            self.running.append(sequence)
            room -= self._chunk(work, sequence, room)
        return work

    def recompute(self) -> None:
        """Every running sequence gives up its state (its weights are gone) and waits in the old order."""
        while self.running:
            self._preempt(self.running[-1])

    def _chunk(self, work: Work, sequence: Sequence, room: int) -> int:
        take = min(sequence.pending, room)
        work.append((sequence, take))
        return take

    def _grow(self, sequence: Sequence) -> bool:
        """Find room for the sequence's next token, if need be at the cost of the youngest; False if that is itself."""
        while not self.pool.grow(sequence):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence)
        sequence.preempted += 1
        self.waiting.appendleft(sequence)
