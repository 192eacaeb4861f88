"""One process: what is applied from outside changes no result, comes in its order, and leaves again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from whimbrel.errors import UserError
from whimbrel.model.config import ModelConfig
from whimbrel.model.language import LanguageModel
from whimbrel.parallel import Axes, applied, collectives, tensor
from whimbrel.parallel.tensor import cuts

CONFIG = ModelConfig(
    pattern="M*-", vocab_size=16, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2,
    head_dim=4, mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=4, n_groups=2,
)  # fmt: skip
TOKENS = torch.arange(12).view(2, 6)


def gradients(model: LanguageModel) -> list[Tensor]:
    model.zero_grad()
    model(TOKENS).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_recomputed_and_compiled_layers_give_the_same_and_are_given_back() -> None:
    model = LanguageModel(CONFIG).initialise(0)
    wanted, wrapped = gradients(model), []

    def compile(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        wrapped.append(forward)
        return torch.compile(forward, backend="eager")

    with applied(model, Axes(), recompute=True, compile=compile) as share:
        assert share.first and share.mine(3) == [0, 1, 2]
        for mine, theirs in zip(gradients(model), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert all(isinstance(forward, partial) for forward in wrapped)  # compiled over what recomputes
    assert len(wrapped) == 3 and all("forward" not in layer.__dict__ for layer in model.layers)


def test_axes_must_make_as_many_processes_as_were_started() -> None:
    model = LanguageModel(CONFIG).initialise(0)
    with (
        pytest.raises(UserError, match=r"makes 2 processes .* but 1 were started; .*launch.processes to 2"),
        applied(model, Axes(fsdp=2)),
    ):
        raise AssertionError


@pytest.mark.parametrize("name", [name for name, _ in LanguageModel(CONFIG, device="meta").named_parameters()])
def test_pieces_of_a_cut_parameter_hold_each_number_once(name: str) -> None:
    whole: Any = dict(LanguageModel(CONFIG, device="meta").named_parameters())[name]
    numbers = torch.arange(whole.numel()).view(whole.shape)
    cut = cuts(CONFIG).get(name)
    if cut is None:
        assert "norm" in name and "norm_weight" not in name
    else:
        pieces = [cut.piece(numbers, rank, 2) for rank in (0, 1)]
        assert pieces[0].shape == pieces[1].shape
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]).sort().values, numbers.flatten())
        assert torch.equal(cut.whole(pieces), numbers)


def test_heads_and_their_groups_stay_together() -> None:
    """Rows of the second rank: heads 2 and 3 (z, x, dt), group 1 (B, C)."""
    rows = torch.arange(CONFIG.in_proj_width)[:, None].expand(-1, CONFIG.hidden_size)
    mine = cuts(CONFIG)["layers.0.mixer.in_proj.weight"].piece(rows, 1, 2)[:, 0].tolist()
    z, x, b, c, dt = 0, 16, 32, 40, 48
    heads = [*range(8, 16)]
    assert mine == [*(z + i for i in heads), *(x + i for i in heads), *range(b + 4, c), *range(c + 4, dt), 50, 51]


def test_the_last_projection_keeps_its_form_and_adds_its_bias_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that hold the same: the sum is twice the product, and one bias."""
    monkeypatch.setattr(collectives, "add", lambda x, group: 2 * x)
    last, x, used = torch.nn.Linear(4, 3), torch.randn(5, 4), []

    def product(x: Tensor) -> Tensor:
        used.append(True)
        return torch.nn.functional.linear(x, last.weight, last.bias)

    group: Any = None
    seen = tensor._gathered(last, product, group, x)
    torch.testing.assert_close(seen, 2 * x @ last.weight.t() + last.bias)
    assert used and isinstance(last.bias, torch.nn.Parameter)
    seen.sum().backward()
    assert last.bias.grad is not None and torch.equal(last.bias.grad, torch.full((3,), 5.0))
