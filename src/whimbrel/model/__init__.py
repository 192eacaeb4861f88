"""What the network is: config, layout, state, the stack, and how it is counted, loaded and saved."""

from whimbrel.model.config import ModelConfig, RopeScaling
from whimbrel.model.language import LanguageModel
from whimbrel.model.layout import Layout
from whimbrel.model.state import State

__all__ = ["LanguageModel", "Layout", "ModelConfig", "RopeScaling", "State"]
