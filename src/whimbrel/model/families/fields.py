"""Reading and writing `config.json`: several spellings of one field, values not computed here, rotary settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from whimbrel.errors import UserError
from whimbrel.model.config import ModelConfig, RopeScaling

REQUIRED = object()


class Fields:
    """A `config.json` that is asked for one field at a time and complains in the file's own words."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        form = raw.get("quantization_config")
        if not isinstance(form, dict) or form.get("quant_method") != "whimbrel":
            self.only("quantization_config", None, "whose weights are compressed; load the checkpoint it was made from")

    def get(self, *spellings: str, default: Any = REQUIRED) -> Any:
        """The value under the first spelling that is there (null: absent); the default, or `UserError` without one."""
        for name in spellings:
            if self.raw.get(name) is not None:
                return number(self.raw[name])
        if default is REQUIRED:
            raise UserError(
                f"{self.where} has no {' or '.join(spellings)}; add it with the value the weights were made with"
            )
        return default

    def size(self, *spellings: str, default: Any = REQUIRED) -> int:
        """A whole number of 1 or more."""
        value = self.get(*spellings, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{self.where} says {spellings[0]} {value!r}; set it to a whole number of 1 or more")
        return value

    def real(self, *spellings: str, default: Any = REQUIRED) -> float:
        """A number above 0."""
        value = self.get(*spellings, default=default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise UserError(f"{self.where} says {spellings[0]} {value!r}; set it to a number above 0")
        return float(value)

    def ids(self, name: str, default: int | None) -> Any:
        """A token id, several of them as a tuple, or None where the file says null."""
        value = self.raw.get(name, default)
        return tuple(value) if isinstance(value, list) else value

    def only(self, name: str, value: Any, reason: str = "which is not computed here") -> None:
        """Refuse the file if it gives `name` a value other than this one. Absent and null mean the usual value."""
        if self.raw.get(name) not in (None, value):
            instead = "remove it" if value is None else f"the only value read is {value!r}"
            raise UserError(f"{self.where} says {name} {self.raw[name]!r}, {reason}; {instead}")

    def rotary(self, usual_fraction: float) -> dict[str, Any]:
        """`rope_theta`, `rope_fraction`, `rope_scaling`, from the top level or inside rope_parameters/rope_scaling."""
        inside = dict(self.raw.get("rope_scaling") or {}) | dict(self.raw.get("rope_parameters") or {})
        if any(isinstance(value, dict) for value in inside.values()):
            raise UserError(
                f"{self.where} gives rope_parameters for each kind of layer; only one set for all layers is read"
            )
        flat = Fields({**self.raw, **inside}, self.where)
        kind = flat.get("rope_type", "type", default="default")
        if kind not in ("default", "llama3"):
            raise UserError(
                f"{self.where} says rope_type {kind!r}, which is not computed here; read are 'default' and 'llama3'"
            )
        return {
            "rope_theta": flat.real("rope_theta", default=10_000.0),
            "rope_fraction": flat.real(
                "partial_rotary_factor", "rope_percent", "rope_percentage", default=usual_fraction
            ),
            "rope_scaling": flat._scaling() if kind == "llama3" else None,
        }

    def _scaling(self) -> RopeScaling:
        return RopeScaling(
            factor=self.real("factor"),
            low_freq_factor=self.real("low_freq_factor"),
            high_freq_factor=self.real("high_freq_factor"),
            original_max_position_embeddings=self.get("original_max_position_embeddings", "max_position_embeddings"),
        )


def number(value: Any) -> Any:
    """Undo transformers 5's spelling of infinity, `{"__float__": "Infinity"}`, alone or inside a list."""
    if isinstance(value, list):
        return [number(item) for item in value]
    return float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else value


def limit(pair: Any, where: str) -> tuple[float, float]:
    """The clamp of the step size; null stands for no bound."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise UserError(f"{where} says time_step_limit {pair!r}; set it to a pair such as [0.0, Infinity]")
    return (float(pair[0] or 0.0), math.inf if pair[1] is None else float(pair[1]))


def rotary_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The spelling that every reader knows: rope_theta at the top level and, for Llama-3.1, rope_scaling."""
    scaling = config.rope_scaling
    said = {"rope_type": "llama3", **vars(scaling)} if scaling is not None else None
    return {"rope_theta": config.rope_theta, "rope_scaling": said}


def ids_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The three special ids, as JSON."""
    eos = config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }


def expressible(config: ModelConfig, fixed: Mapping[str, Any]) -> None:
    """Raise `UserError` for a network that this family's folder cannot say, naming the field."""
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{name} is {getattr(config, name)!r}, which a {config.family} folder cannot say; "
                f"set {name} to {value!r}, or family to one that has it"
            )
