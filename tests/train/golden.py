"""Record the losses of the tiny run in golden.json: `python tests/train/golden.py`.

Only with a reason in the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tiny_run import curve, tiny_train

STEPS = 30


def main() -> None:
    """Run and write."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_train(Path(folder), steps=STEPS)
        lines = curve(Path(folder))
    names = ("loss", "validation_loss")
    recorded = {name: [line[name] for line in lines if name in line] for name in names}
    (Path(__file__).parent / "golden.json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
