"""Run: pytest tests/model/test_presets.py. Published totals, layer counts and states of every preset."""

from __future__ import annotations

import pytest

from whimbrel.errors import UserError
from whimbrel.model import count
from whimbrel.model.presets import PRESETS, preset

GIB, MIB, KIB = 2**30, 2**20, 2**10

# Published, or derived from published shapes.
TOTALS = {
    "nemotron-h-4b": 4.489e9,
    "nemotron-h-8b": 8.101e9,
    "nemotron-h-47b": 46.79e9,
    "nemotron-h-56b": 56.32e9,
    "nemotron-nano-12b-v2": 12.31e9,
    "nemotron-nano-9b-v2": 8.888e9,
}
EXACT = {
    "qwen3-8b": 8_190_735_360,
    "llama-3.1-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
    "hybrid-tiny": 296_880,
    "hybrid-1m": 1_111_904,
}


def four_digits(number: float) -> str:
    return f"{number:.3e}"


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals_to_four_digits(name: str) -> None:
    assert four_digits(count.total(preset(name))) == four_digits(TOTALS[name])


@pytest.mark.parametrize("name", EXACT)
def test_known_totals_exactly(name: str) -> None:
    assert count.total(preset(name)) == EXACT[name]


@pytest.mark.parametrize(
    ("name", "tables", "rest"), [("nemotron-4-15b", 3.15, 12.48), ("nemotron-4-340b", 9.44, 331.58)]
)
def test_nemotron_4_tables_and_rest(name: str, tables: float, rest: float) -> None:
    roles = count.parameters(preset(name))
    in_tables = roles["embedding"] + roles["head"]
    assert round(in_tables / 1e9, 2) == tables
    assert round((sum(roles.values()) - roles["norm"] - in_tables) / 1e9, 2) == rest


@pytest.mark.parametrize(
    ("name", "layers", "counts", "in_proj", "per_layer"),
    [
        ("nemotron-h-4b", 52, (24, 24, 4), 16496, (72.8, 75.5, 31.5)),
        ("nemotron-h-8b", 52, (24, 24, 4), 18560, (109.6, 176.2, 42.0)),
        ("nemotron-h-47b", 98, (45, 48, 5), 37120, (438.4, 503.3, 151.0)),
        ("nemotron-h-56b", 118, (54, 54, 10), 37120, (438.4, 536.9, 151.0)),
        ("nemotron-nano-12b-v2", 62, (28, 28, 6), 22656, (168.5, 209.7, 62.9)),
        ("nemotron-nano-9b-v2", 56, (27, 25, 4), 22656, (147.5, 140.5, 55.1)),
    ],
)
def test_hybrid_layers(
    name: str, layers: int, counts: tuple[int, ...], in_proj: int, per_layer: tuple[float, ...]
) -> None:
    config, roles = preset(name), count.parameters(preset(name))
    assert config.layers == layers
    assert tuple(config.count(letter) for letter in "M-*") == counts
    assert config.in_proj_width == in_proj
    millions = [roles[role] / n / 1e6 for role, n in zip(("mamba", "mlp", "attention"), counts, strict=True)]
    assert millions == pytest.approx(per_layer, abs=0.06)  # printed with one digit, some with their norm


@pytest.mark.parametrize(
    ("name", "kv_token", "ssm_mib"),
    [
        ("nemotron-h-4b", 16 * KIB, 84),
        ("nemotron-h-8b", 16 * KIB, 96),
        ("nemotron-h-47b", 20 * KIB, 720),
        ("nemotron-h-56b", 40 * KIB, 864),
        ("nemotron-nano-12b-v2", 24 * KIB, 140),
        ("nemotron-nano-9b-v2", 16 * KIB, 135),
    ],
)
def test_published_memory_of_a_sequence(name: str, kv_token: int, ssm_mib: int) -> None:
    config = preset(name)
    tail = config.count("M") * config.conv_channels * (config.conv_kernel - 1) * 2
    assert count.kv_bytes(config, 1) == kv_token
    assert count.state_bytes(config) - tail == ssm_mib * MIB


def test_attention_places() -> None:
    assert preset("nemotron-h-8b").indices("*") == (7, 18, 29, 40)
    assert preset("nemotron-h-56b").indices("*") == tuple(range(7, 107, 11))
    assert preset("nemotron-nano-12b-v2").indices("*") == (7, 16, 25, 34, 43, 52)
    assert preset("nemotron-nano-9b-v2").indices("*") == (14, 21, 30, 39)


def test_speed_pair() -> None:
    """The two models that speed is measured on, held to figures of other implementations of the same shapes."""
    hybrid, dense = preset("hybrid-290m"), preset("dense-283m")
    assert four_digits(count.total(hybrid)) == four_digits(289.6e6)
    assert four_digits(count.total(dense)) == four_digits(282.6e6)
    assert round(count.flops(hybrid, 1)["matmul"] / 1e9, 3) == 0.448
    assert round(count.flops(dense, 1)["matmul"] / 1e9, 3) == 0.434
    assert count.kv_bytes(hybrid, 1) == 2 * KIB
    assert count.kv_bytes(dense, 1) == 18 * KIB
    assert count.decode_bytes(hybrid, 0, dtype="float32")["weights"] == pytest.approx(1028e6, rel=1e-3)
    assert count.decode_bytes(dense, 0, dtype="float32")["weights"] == pytest.approx(999e6, rel=1e-3)


def test_twins_are_of_one_size() -> None:
    for hybrid, dense in (("hybrid-tiny", "dense-tiny"), ("hybrid-290m", "dense-283m")):
        assert count.total(preset(dense)) == pytest.approx(count.total(preset(hybrid)), rel=0.03)


def test_wrong_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match="nemotron-nano-9b-v2"):
        preset("nemotron-nano-9b")
    assert len(PRESETS) == len(set(PRESETS.values())), "two names for one shape"
