"""One model over several processes, applied from outside: copies, shards, pieces of a row, parts of every matrix.

docs/parallel.md is the room's page.
"""

from whimbrel.parallel.apply import applied
from whimbrel.parallel.mesh import Axes, Share
from whimbrel.parallel.pieces import gathered, local, whole

__all__ = ["Axes", "Share", "applied", "gathered", "local", "whole"]
