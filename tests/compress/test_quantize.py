"""`whimbrel quantize`: the folder it writes is the one the pages describe, its card says what was measured, and what
cannot work is refused in one line.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from whimbrel import LanguageModel, ModelConfig, Tokenizer, cli
from whimbrel.compress.calibrate import perplexity, visit
from whimbrel.compress.quantize import quantize, round_model
from whimbrel.compress.rounding import calibrated, gptq, inverse_factor, scales
from whimbrel.errors import UserError
from whimbrel.model.linear import matrices
from whimbrel.ops.packed import integers, pack, round_to_nearest, unpack

HYBRID = ModelConfig(
    "M-*-", 320, 64, 80, num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_num_heads=4,
    mamba_head_dim=16, ssm_state_size=16, n_groups=2, max_position_embeddings=512,
)  # fmt: skip
LINES = (f"Page {n}: the whimbrel crosses {n * n % 97} oceans, {'and' if n % 3 else 'or'} rests." for n in range(600))
TEXT = " ".join(LINES)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small random hybrid (`m`) with a vocabulary, and a text (`text`)."""
    place = tmp_path_factory.mktemp("world")
    save(place / "m", HYBRID)
    (place / "text").write_text(TEXT)
    return place


def save(folder: Path, config: ModelConfig) -> None:
    model, g = LanguageModel(config).initialise(0).requires_grad_(False), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
    model.save(folder)
    Tokenizer.train([TEXT], 320).save(folder)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("to", "bits"), [("int8", 8), ("int4", 4)])
def test_the_folder_is_as_described(world: Path, tmp_path: Path, to: str, bits: int, method: str) -> None:
    made = quantize(str(world / "m"), tmp_path / "q", to=to, method=method, texts=[world / "text"])
    said = json.loads((tmp_path / "q" / "config.json").read_text())
    kept = said["quantization_config"].pop("modules_not_to_convert")
    assert said["quantization_config"] == {"quant_method": "whimbrel", "bits": bits, "group_size": 32}
    down = ["backbone.layers.1.mixer.down_proj", "backbone.layers.3.mixer.down_proj"]  # 80 inputs
    assert sorted(kept) == ["backbone.embeddings", *down]
    assert set(made.float16) == {"layers.1.mixer.down_proj", "layers.3.mixer.down_proj"}
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shape = {name: (part.get_dtype(), part.get_shape()) for name, part in held.items()}
    assert shape["backbone.embeddings.weight"] == ("F16", [320, 64])
    assert shape[f"{down[0]}.weight"] == ("F16", [64, 80])
    kind, name = {8: "I8", 4: "U8"}[bits], "backbone.layers.1.mixer.up_proj.weight"
    assert shape[f"{name}.codes"] == (kind, [10, 2 * bits, 32]) and name not in shape
    assert shape[f"{name}.scales"] == ("F16", [10, 2, 8])
    assert shape["lm_head.weight.codes"] == (kind, [40, 2 * bits, 32])
    assert shape["backbone.layers.0.mixer.A_log"][0] == "F32"
    again = LanguageModel.load(tmp_path / "q")
    before = LanguageModel.load(world / "m")
    for name, weight in matrices(again).items():
        change = (unpack(weight) - matrices(before)[name]).norm() / matrices(before)[name].norm()
        assert change < (1e-3 if weight.bits == 16 else 0.02 if bits == 8 else 0.25), name
    card = (tmp_path / "q" / "README.md").read_text()
    assert f"{made.perplexity_before:.4g} in float32, {made.perplexity_after:.4g} as stored here" in card
    assert f"`whimbrel quantize --to {to} --group 32 --method {method}`" in card


def test_perplexity_is_that_of_the_folder(world: Path, tmp_path: Path) -> None:
    made = quantize(str(world / "m"), tmp_path / "q", to="int4", texts=[world / "text"])
    ids = Tokenizer.load(world / "m").encode(TEXT)
    windows = [torch.tensor(ids[at : at + 1024]) for at in range(0, len(ids), 1024)]
    windows = [windows[i * len(windows) // 8] for i in range(8)] if len(windows) > 8 else windows
    assert perplexity(LanguageModel.load(tmp_path / "q"), windows) == pytest.approx(made.perplexity_after, rel=1e-5)
    assert perplexity(LanguageModel.load(world / "m"), windows) == pytest.approx(made.perplexity_before, rel=1e-5)


def test_a_tied_embedding_is_rounded_as_the_head(tmp_path: Path) -> None:
    save(tmp_path / "m", replace(HYBRID, tie_embeddings=True))
    (tmp_path / "text").write_text(TEXT)
    quantize(str(tmp_path / "m"), tmp_path / "q", to="int4", method="gptq", texts=[tmp_path / "text"], group=64)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert "backbone.embeddings" not in said["modules_not_to_convert"] and said["group_size"] == 64
    model = LanguageModel.load(tmp_path / "q")
    assert model.embeddings.weight.bits == 4 and "head" not in matrices(model)


def test_calibrated_rounding_moves_the_outputs_less() -> None:
    """On inputs that are correlated, as a network's are; and its codes and scales are such as can be stored."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 96, generator=g) @ torch.randn(96, 96, generator=g) * torch.rand(96, generator=g)
    weight = torch.randn(40, 96, generator=g)
    for bits in (8, 4):
        code, scale = calibrated(weight, x.T @ x, bits, 32)
        held = pack(code, scale, bits)
        assert torch.equal(integers(held)[0], code) and torch.equal(integers(held)[1], scale)
        first = pack(*gptq(weight, inverse_factor(x.T @ x / 2000 + 0.01 * torch.eye(96)), bits, 32), bits)
        moved = [((unpack(form) - weight) @ x.T).norm() for form in (held, first, round_to_nearest(weight, bits, 32))]
        assert moved[0] < 0.95 * moved[1] and moved[1] < 0.8 * moved[2]


def test_an_input_that_was_never_seen_and_a_row_of_zeros_do_no_harm() -> None:
    x = torch.randn(50, 64)
    x[:, 7] = 0
    weight = torch.randn(8, 64)
    weight[3] = 0
    code, scale = calibrated(weight, x.T @ x, 4, 32)
    value = unpack(pack(code, scale, 4))
    assert torch.isfinite(value).all() and not value[3].any()
    assert torch.equal(scales(torch.zeros(32, 2), 4, torch.ones(32)), torch.zeros(2))
    assert torch.isfinite(calibrated(weight, torch.zeros(64, 64), 4, 32)[1]).all()


def test_matrices_are_visited_in_the_order_of_computation_with_what_reaches_them(world: Path) -> None:
    model = LanguageModel.load(world / "m").requires_grad_(False)
    window = torch.arange(40)
    seen: dict[str, torch.Tensor] = {}

    def look(name: str):
        return lambda _, inputs: seen.__setitem__(name, inputs[0].double().T @ inputs[0].double())

    hooks = [m.register_forward_pre_hook(look(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    model.head.register_forward_pre_hook(look("head"))
    with torch.no_grad():
        model(window[None])
    for hook in hooks:
        hook.remove()
    found = dict(visit(model, [window]))
    assert list(found) == [*(name for name in matrices(model) if name.startswith("layers")), "head"]
    for name, gram in found.items():
        torch.testing.assert_close(gram, seen[name], rtol=1e-4, atol=1e-4)


REFUSED = [
    ("int3", {}, "--to is 'int3'"),
    ("int4", {"group": 48}, "--group is 48; set it to 32, 64 or 128"),
    ("int4", {"group": 128}, "--group is 128, which divides the inputs of no matrix of this model; set it to 64"),
    ("int4", {"method": "awq"}, "--method is 'awq'"),
    ("int4", {"method": "gptq"}, "--method gptq needs text"),
    ("int4", {"method": "gptq", "texts": ["short"]}, "holds 1 windows of 1024 tokens; give at least 5"),
    ("int4", {"texts": ["empty"]}, "holds 0 windows of 1024 tokens; give at least 1"),
    ("int4", {"texts": ["absent"]}, "--text .*absent is no text in UTF-8"),
    ("int4", {"texts": ["bytes"]}, "--text .*bytes is no text in UTF-8"),
    ("int4", {"texts": ["m"]}, "--text .*m is no text in UTF-8"),
    ("int4", {"out": "m"}, "the model itself"),
    ("int4", {"out": "taken"}, "not a model"),
]


@pytest.mark.parametrize(("to", "settings", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_what_cannot_work_is_refused(world: Path, to: str, settings: dict, message: str) -> None:
    (world / "short").write_text("A short page.")
    (world / "empty").write_text("")
    (world / "bytes").write_bytes(b"\xff\xfe\x00")
    (world / "taken").mkdir(exist_ok=True)
    (world / "taken" / "file").touch()
    settings = {"out": "q", **settings}
    with pytest.raises(UserError, match=message) as caught:
        texts = [world / name for name in settings.pop("texts", [])]
        quantize(str(world / "m"), world / settings.pop("out"), to=to, texts=texts, **settings)
    assert "\n" not in str(caught.value) and not (world / "q").exists()


def test_widths_that_no_group_divides(tmp_path: Path) -> None:
    save(tmp_path / "m", replace(HYBRID, pattern="*-", hidden_size=40, intermediate_size=24, head_dim=10))
    with pytest.raises(UserError, match="so it stays as it is"):
        quantize(str(tmp_path / "m"), tmp_path / "q", to="int8")


def test_a_folder_of_few_bits_is_refused_by_the_command(world: Path, tmp_path: Path, capsys) -> None:
    words = ["quantize", str(world / "m"), "--to", "int8", "-o", str(tmp_path / "q"), "--text", str(world / "text")]
    assert cli.main(words) == 0
    assert "perplexity: " in capsys.readouterr().out
    assert cli.main(["quantize", str(tmp_path / "q"), "--to", "int4", "-o", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "holds int8 already; quantise the model that it was made from" in error and "Traceback" not in error


def test_rounding_twice_gives_the_same_bits(world: Path) -> None:
    windows = [torch.randint(0, 320, (200,), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    states = []
    for _ in range(2):
        model = LanguageModel.load(world / "m").requires_grad_(False)
        round_model(model, 4, 32, "gptq", windows)
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
