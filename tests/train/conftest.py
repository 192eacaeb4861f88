"""These tests start processes, which find the tiny model where the tests find it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
