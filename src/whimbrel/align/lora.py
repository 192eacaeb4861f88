"""Low-rank adapters: W x + (alpha / rank) B A x, where W stays as it is (LoRA, arXiv 2106.09685).

B starts at 0, so that an attached model is the model. `merge` adds the product to W and leaves a plain model; `save`
writes the adapter in the form of the PEFT library. I inputs, O outputs, R rank, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from whimbrel.errors import UserError, nearest
from whimbrel.files import atomic_folder
from whimbrel.model import LanguageModel, families
from whimbrel.parallel import whole

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """An adapter beside some of the projections; everything else is frozen."""

    rank: int = 16
    alpha: float = 32.0
    """The product is scaled by alpha / rank."""
    targets: tuple[str, ...] = tuple(target for target in TARGETS if target != "out_proj")
    """Projections that get an adapter, by the last part of their name. `out_proj` of Mamba layers is left out because
    PEFT refuses an adapter that has it.
    """

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; set lora.rank to 1 or more, for example 16")
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"lora.targets has {target!r}; {nearest(target, TARGETS)}")


class LoraLinear(nn.Linear):
    """A frozen projection with an adapter beside it; `weight` and `bias` keep their names."""

    def __init__(self, plain: nn.Linear, settings: LoraSettings, generator: torch.Generator) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.scale = settings.alpha / settings.rank
        bound = 1 / math.sqrt(plain.in_features)
        start_RI = torch.empty(settings.rank, plain.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start_RI.to(plain.weight))
        self.lora_B = nn.Parameter(plain.weight.new_zeros(plain.out_features, settings.rank))

    def forward(self, x_TI: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return super().forward(x_TI) + self.scale * ((x_TI @ self.lora_A.t()) @ self.lora_B.t())


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every adapter of a model, by the name of its projection."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def attach(model: LanguageModel, settings: LoraSettings, seed: int) -> LanguageModel:
    """Freeze a model and put adapters into it. UserError if it has none of the projections asked for."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    chosen = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in chosen if name.rpartition(".")[2] in settings.targets]
    if not chosen:
        raise UserError(f"lora.targets {list(settings.targets)} fit no projection of this model; set it to {TARGETS}")
    for name in chosen:
        _replace(model, name, LoraLinear(model.get_submodule(name), settings, generator))  # type: ignore[arg-type]
    model.touch()
    return model


@torch.no_grad()
def merge(model: LanguageModel) -> LanguageModel:
    """Add every adapter to its projection and take it out; the model is then plain and trainable as before."""
    for name, module in list(adapters(model)):
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        plain.weight += module.scale * (module.lora_B @ module.lora_A)
        _replace(model, name, plain)
    model.requires_grad_(True)
    model.touch()
    return model


def save(model: LanguageModel, folder: Path, settings: LoraSettings, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does, for the base model of this name; of
    several ranks, which all call it, the first one writes.
    """
    names = families.names(model.config)
    tensors = {}
    for name, module in adapters(model):
        theirs = f"base_model.model.{names[f'{name}.weight'].removesuffix('.weight')}"
        tensors[f"{theirs}.lora_A.weight"] = whole(module.lora_A.detach()).contiguous()
        tensors[f"{theirs}.lora_B.weight"] = whole(module.lora_B.detach()).contiguous()
    used = sorted({name.rpartition(".")[2] for name, _ in adapters(model)})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    config |= {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": used}
    config |= {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False}
    if model.share is not None and not model.share.first:
        return
    with atomic_folder(folder) as beside:
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
        (beside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where another was; the layer's decoder reads its mixer's modules anew in every call."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
