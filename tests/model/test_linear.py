"""A model whose matrices have few bits computes what their values say, and refuses what does not fit."""

import pytest
import torch

from whimbrel import ops
from whimbrel.errors import UserError
from whimbrel.model import LanguageModel, ModelConfig
from whimbrel.model.linear import PackedLinear, pack_model
from whimbrel.ops.packed import unpack

HYBRID = ModelConfig(
    "M-*-", 50, 64, 96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2,
)  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_equals_the_model_of_its_values(bits, tied):
    config = ModelConfig(**{**HYBRID.__dict__, "tie_embeddings": tied})
    plain, packed = (LanguageModel(config).initialise(0) for _ in range(2))
    pack_model(packed, bits, 32)
    names = dict(plain.named_parameters())
    for name, module in packed.named_modules():
        if name.endswith(".weight"):
            names.pop(name).data.copy_(unpack(module.value))
    assert not any(p.dim() == 2 and "conv" not in name for name, p in names.items()), "every matrix was packed"
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad(), ops.using("torch"):
        torch.testing.assert_close(packed(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
    assert packed.dtype == torch.float32 and packed.weights_version > 1


def test_the_state_dict_names_codes_and_scales():
    model = LanguageModel(HYBRID).initialise(0)
    pack_model(model, 4, 32)
    assert isinstance(model.layers[1].mixer.up_proj, PackedLinear)
    names = set(model.state_dict())
    for name in ("embeddings", "head", "layers.1.mixer.up_proj", "layers.2.mixer.q_proj", "layers.0.mixer.in_proj"):
        assert {f"{name}.weight.codes", f"{name}.weight.scales"} <= names
        assert f"{name}.weight" not in names


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="set group_size to 64"):
        pack_model(LanguageModel(HYBRID).initialise(0), 4, 128)
