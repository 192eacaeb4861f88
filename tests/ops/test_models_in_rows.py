"""Models of few bits in the form that a GPU holds, on a CPU: loaded as there, kernels in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from kernels import gap
from torch.utils._python_dispatch import TorchDispatchMode

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, ModelConfig, checkpoint, fewbits
from whimbrel.model.layout import Layout
from whimbrel.model.linear import pack_model, place
from whimbrel.model.state import State
from whimbrel.ops import packed

HYBRID = ModelConfig(
    "M-*-", 50, 64, 96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, mlp_bias=True,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2,
)  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) % 50


def spread(config):
    """Random weights none of which is trivial."""
    model = LanguageModel(config).initialise(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith(("A_log", "dt_bias", "D")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes a folder of few bits and says how to load it as on a GPU."""

    def write(bits, tied=False, kept=()):
        torch.manual_seed(0)
        model = spread(replace(HYBRID, tie_embeddings=tied))
        pack_model(model, bits)
        for name in kept:
            place(model, name, packed.pack(packed.unpack(model.get_submodule(name).weight.value), None, 16))
        checkpoint.save(model, tmp_path / "q")
        return tmp_path / "q"

    def load(path, dtype):
        monkeypatch.setattr(checkpoint, "by_rows", lambda device: True)
        return checkpoint.load(path, dtype=dtype)

    return write, load


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_in_rows_has_the_logits_of_the_same_folder_on_a_cpu(folder, bits, tied):
    """float32 exactly but for rounding; bfloat16 within what the unpacked model loses in it; and beside activations
    that are rounded to 8 bits, as the native library does.
    """
    write, load = folder
    path = write(bits, tied)
    plain = checkpoint.load(path)
    with torch.no_grad():
        native = plain(TOKENS)
        with ops.using("torch"):
            true = plain(TOKENS)
        for dtype, most in (("float32", 1e-4), ("bfloat16", 2e-2)):
            model = load(path, dtype)
            forms = {getattr(m, "form", "rows") for m in model.modules()}
            assert forms == {"rows"} and model.dtype == getattr(torch, dtype)
            with ops.using("triton"):
                got = model(TOKENS)
            assert got.dtype == torch.float32 and gap(got, true) < most and gap(got, native) < max(most, 3e-2)


def test_matrices_kept_at_16_bits_are_plain_there(folder):
    write, load = folder
    path = write(8, kept=("embeddings", "layers.1.mixer.up_proj"))
    model = load(path, "bfloat16")
    assert model.embeddings.weight.dtype == model.layers[1].mixer.up_proj.weight.dtype == torch.bfloat16
    assert model.kv_dtype == torch.bfloat16 and model.layers[0].mixer.A_log.dtype == torch.float32
    assert torch.isfinite(model(TOKENS)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_and_prompts_agree_and_nothing_waits_for_the_device(folder, bits):
    """One token of three sequences after a prompt: the logits of one pass. Nothing asks a tensor for its value."""
    write, load = folder
    model = load(write(bits), "float32")
    row = TOKENS[0]

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    state = State.empty(HYBRID, slots=3, blocks=6)
    with torch.inference_mode(), ops.using("triton"):
        whole = model(TOKENS[:1])[0]
        slots, table = torch.arange(3), torch.arange(6).view(3, 2)
        layout = Layout.of([11] * 3, [0] * 3, slots=slots, block_table=table)
        model(row[:11].repeat(3), layout, state)
        layout = Layout.of([1] * 3, [11] * 3, slots=slots, block_table=table)
        hidden = model(row[11:].repeat(3), layout, state)
        torch.testing.assert_close(model.head(hidden), whole[11:].expand(3, -1), rtol=1e-3, atol=1e-4)
        up = model.layers[1].mixer.up_proj
        with NoWaiting():
            packed.rows(model.embeddings.weight.value, row)
            ops.linear(hidden, up.weight.value, up.bias)


def test_what_cannot_be_is_refused_in_one_line(folder, tmp_path):
    write, load = folder
    path = write(8)
    with pytest.raises(
        UserError, match=r"dtype is bfloat16, but .* holds int8, computed in float32; set dtype to float32"
    ):
        checkpoint.load(path, dtype="bfloat16")
    with pytest.raises(UserError, match=r"dtype is fp8, but .* holds int8.* set dtype to float32"):
        checkpoint.load(path, dtype="fp8")
    with pytest.raises(UserError, match=r"dtype is float16, but .* set dtype to bfloat16"):
        load(path, "float16")
    model = load(path, "bfloat16")
    assert not ops.cpu.readable(model.layers[1].mixer.up_proj.weight.value)
    with pytest.raises(UserError, match="'rows', which only a GPU's kernels read; load the model with device cpu"):
        checkpoint.save(model, tmp_path / "again")


def test_fp8_rounds_projections_and_nothing_else(folder, tmp_path):
    """Four bits of each weight and activation are kept: logits stay within a tenth of the largest."""
    checkpoint.save(spread(HYBRID), tmp_path / "m")
    _, load = folder
    plain, model = checkpoint.load(tmp_path / "m"), checkpoint.load(tmp_path / "m", dtype="fp8")
    forms = {name.rpartition(".")[0] for name, m in model.named_modules() if getattr(m, "form", "") == "fp8"}
    projections = {name for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert forms == projections and len(forms) == 10
    assert torch.equal(model.embeddings.weight, plain.embeddings.weight) and model.dtype == torch.float32
    up, true = model.layers[1].mixer.up_proj.weight.value, plain.layers[1].mixer.up_proj.weight
    assert up.codes.shape == (96, 64) and up.scales.shape == (96, 1) and up.shape == (96, 64)
    assert 25 < 20 * torch.log10(true.norm() / (packed.unpack(up) - true).norm()) < 40
    assert torch.equal(model.layers[1].mixer.up_proj.bias, plain.layers[1].mixer.up_proj.bias)
    there = load(tmp_path / "m", "fp8")
    with torch.no_grad():
        exact, mine = plain(TOKENS), model(TOKENS)
        with ops.using("triton"):
            lower = there(TOKENS)
    assert there.dtype == there.kv_dtype == torch.bfloat16
    assert 0 < gap(mine, exact) < 0.1 and gap(lower, mine) < 0.1
    with pytest.raises(UserError, match="'fp8', which only a GPU's kernels read"):
        checkpoint.save(model, tmp_path / "again")


def test_a_packed_model_is_turned_into_rows_where_it_lies():
    model = spread(HYBRID)
    pack_model(model, 4)
    with torch.no_grad(), ops.using("torch"):
        before = model(TOKENS)
        fewbits.settle(model, torch.float32)
        assert {getattr(m, "form", "rows") for m in model.modules()} == {"rows"}
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-6)
