"""One thread a process: two tests at a time on two cores would otherwise wait for each other inside every operation."""

import torch

torch.set_num_threads(1)
