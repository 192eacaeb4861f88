"""What a float16 state costs: a small random hybrid decodes random tokens over it, beside the same over float32.

Run: python benchmarks/half_state.py [TOKENS]. Prints, for rounding at random and (for comparison) to the nearest, the
mean and the largest difference of a log-probability (nats), the mean over the last quarter, and of the states at the
end ||float16 - float32|| / ||float32||.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.model.layout import Layout
from whimbrel.model.state import State
from whimbrel.ops.torch import scan

CONFIG = ModelConfig(
    pattern="M*-MM-*", vocab_size=320, hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=32, n_groups=2,
)  # fmt: skip


@torch.inference_mode()
def decode(model: LanguageModel, ids: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T, V], one token at a time, and the states at the end."""
    blocks = -(-len(ids) // 16)
    state = State.empty(CONFIG, slots=1, blocks=blocks, ssm_dtype=kind)
    slots, table = torch.zeros(1, dtype=torch.int64), torch.arange(blocks)[None]
    rows = []
    for t in range(len(ids)):
        layout = Layout.of([1], [t], slots=slots, block_table=table)
        rows.append(model.head(model(ids[t : t + 1], layout, state)).double().log_softmax(-1))
    return torch.cat(rows), torch.cat([tensor.double().flatten() for tensor in state.ssm.values()])


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 4096
    model = LanguageModel(CONFIG).initialise(0)
    with torch.no_grad():  # answers that depend on the whole prompt
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "conv" not in name:
                parameter.mul_(6)
    ids = torch.randint(320, (tokens,), generator=torch.Generator().manual_seed(0))
    exact, states = decode(model, ids, torch.float32)
    nearest: Callable[[Tensor, Tensor], Tensor] = lambda x, _: x.half().float()  # noqa: E731
    for name, rounding in (("at random", scan._at_random), ("to the nearest", nearest)):
        scan._at_random = rounding
        found, mine = decode(model, ids, torch.float16)
        gap = (exact - found).abs()
        same = (exact.argmax(-1) == found.argmax(-1)).double().mean().item()
        figures = {"mean": gap.mean(), "last_quarter": gap[-tokens // 4 :].mean(), "largest": gap.max()}
        figures["states"] = (mine - states).norm() / states.norm()
        said = {"rounding": name, "tokens": tokens, "same_likeliest": same}
        print(json.dumps(said | {key: value.item() for key, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
