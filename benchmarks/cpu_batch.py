"""Decoding 4 and 16 sequences together beside llama.cpp, int8 against q8_0, 256 tokens of context each; twins at 16k.

As `cpu_decode.py`; floor: the longer of bytes over bandwidth (the batch is small, so it is that one).
Run: python benchmarks/cpu_batch.py --peer-python PYTHON [--rows hybrid-int8-16 …]
"""

from __future__ import annotations

from functools import partial

from cpu_decode import together, twins
from cpu_peer import main

ROWS = {
    f"{shape}-int8-{batch}": partial(together, shape, "int8", 256, batch)
    for shape in ("hybrid", "dense")
    for batch in (4, 16)
}
ROWS["twins-int8-16384-16"] = partial(twins, "int8", 16384, 16)

if __name__ == "__main__":
    main("cpu_batch", __doc__ or "", ROWS)
