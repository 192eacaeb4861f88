"""One rank works alone for longer than torch lets the others wait: `wait.py`, run by every rank."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
from torch import distributed

from whimbrel.parallel import Axes, Share

if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(seconds=8))
    share = Share.meet(Axes(data=2), torch.device("cpu"))
    share.barrier()
    assert share.once(lambda: time.sleep(10) or 5) == 5
    share.barrier()  # nobody hangs up while the other still listens
    distributed.destroy_process_group()
