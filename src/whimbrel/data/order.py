"""The order of data: a keyed permutation of [0, n), another one in every epoch, computed and never stored.

A Feistel network permutes the smallest square power of four that holds n; an image outside [0, n) is permuted again
until it falls inside ("cycle walking"), which keeps it a bijection of [0, n). Where training stands is one integer.
Not for secrets: the round function mixes well and fast, it is no cipher.

Black and Rogaway, Ciphers with Arbitrary Finite Domains (2002), section 3; the mixer is splitmix64's finaliser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from whimbrel.errors import UserError

ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_U64 = 2**64 - 1

Words = NDArray[np.uint64]


def _mix(x: Words) -> Words:
    """A bijection of 64-bit words in which every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Permutation:
    """A permutation of [0, n) for every epoch: a pure function of (n, seed, epoch, place)."""

    n: int
    seed: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"an order of {self.n} items is asked for; there has to be at least 1")

    def __call__(self, index: ArrayLike) -> NDArray[np.int64]:
        """Items that stand at `index`, counted on over the epochs: index // n is the epoch, index % n the place."""
        index = np.asarray(index, dtype=np.int64)
        epoch, place = np.divmod(np.atleast_1d(index), self.n)
        return self._walk(place, epoch, forward=True).reshape(index.shape)

    def places(self, items: ArrayLike, epoch: int) -> NDArray[np.int64]:
        """Where in `epoch` the items stand, counted from its start: the inverse."""
        items = np.asarray(items, dtype=np.int64)
        flat = np.atleast_1d(items)
        return self._walk(flat, np.full_like(flat, epoch), forward=False).reshape(items.shape)

    def _walk(self, values: NDArray[np.int64], epoch: NDArray[np.int64], forward: bool) -> NDArray[np.int64]:
        # The seed is mixed before the epoch is added: seed 1's second epoch must not be seed 2's first.
        seed = _mix(np.array([(self.seed + 1) * _GOLDEN & _U64], np.uint64))
        key = _mix(seed + epoch.astype(np.uint64) * np.uint64(_GOLDEN))
        at = self._network(values.astype(np.uint64), key, forward)
        while (outside := at >= np.uint64(self.n)).any():
            at[outside] = self._network(at[outside], key[outside], forward)
        return at.astype(np.int64)

    def _network(self, values: Words, key: Words, forward: bool) -> Words:
        # At least 3 bits a half: a network over fewer states cannot reach all orders of a handful of items.
        half = np.uint64(max(3, ((self.n - 1).bit_length() + 1) // 2))
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        for number in range(ROUNDS) if forward else reversed(range(ROUNDS)):
            salt = np.uint64((number + 1) * _GOLDEN & _U64)
            if forward:
                left, right = right, left ^ (_mix(right ^ key ^ salt) & mask)
            else:
                left, right = right ^ (_mix(left ^ key ^ salt) & mask), left
        return (left << half) | right
