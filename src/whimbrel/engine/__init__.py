"""From text to text: sequences, scheduler, state pool, sampler, thinking budget. See docs/engine.md."""

from whimbrel.engine.answer import Answer, Chunk
from whimbrel.engine.engine import Engine
from whimbrel.engine.sampling import Sampling

__all__ = ["Answer", "Chunk", "Engine", "Sampling"]
