"""Adapters as PEFT reads them: the logits of base and adapter there are those of the model with the adapter here.

pip install --no-deps peft accelerate psutil beside transformers; where PEFT is absent, `tests/align/test_lora.py` holds
names, shapes and config to what this test found it to read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from whimbrel.align import lora
from whimbrel.align.lora import LoraSettings
from whimbrel.model import LanguageModel, ModelConfig

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
os.environ["HF_HUB_OFFLINE"] = "1"
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "nemotron_h": {"pattern": "M*-M", "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2},
    "llama": {"pattern": "*-*-", "mlp": "swiglu", "rope_theta": 1e4, "tie_embeddings": True},
    "qwen3": {"pattern": "*-*-", "mlp": "swiglu", "qk_norm": True, "rope_theta": 1e4},
}
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize("targets", [LoraSettings().targets, ("q_proj", "in_proj", "down_proj")])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_there_is_the_adapter_here(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    model = LanguageModel(ModelConfig(**SHAPE, **FAMILIES[family], family=family)).initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save(tmp_path / "base")
    plain = model(TOKENS)
    settings = LoraSettings(rank=3, alpha=5.0, targets=targets)
    lora.attach(model, settings, 0)
    with torch.no_grad():
        for _, module in lora.adapters(model):
            module.lora_B.normal_(generator=generator)
    model.touch()
    lora.save(model, tmp_path / "adapter", settings, str(tmp_path / "base"))
    ours = model(TOKENS)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for module in base.modules():
        if hasattr(module, "time_step_limit"):  # the fault of their prefill that test_transformers.py tells of
            module.time_step_limit = (0.0, float("inf"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        found = theirs(TOKENS).logits
        torch.testing.assert_close(found, ours, atol=1e-4 * float(ours.abs().max()), rtol=0)
        merged = theirs.merge_and_unload()(TOKENS).logits
        torch.testing.assert_close(lora.merge(model)(TOKENS), merged, atol=1e-4 * float(ours.abs().max()), rtol=0)
    assert float((ours - plain).abs().max()) > 0.01 * float(ours.abs().max()), "the adapter does nothing"


def test_peft_refuses_what_we_leave_out_by_default(tmp_path: Path) -> None:
    """The day it does not, `out_proj` can be a target by default."""
    model = LanguageModel(ModelConfig(**SHAPE, **FAMILIES["nemotron_h"], family="nemotron_h")).initialise(0)
    model.save(tmp_path / "base")
    settings = LoraSettings(rank=2, targets=("out_proj",))
    lora.save(lora.attach(model, settings, 0), tmp_path / "adapter", settings, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
