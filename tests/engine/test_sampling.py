"""Settings are refused in the user's words."""

import pytest

from whimbrel.engine import Sampling
from whimbrel.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("stop", ("",)),
        ("stop", (3,)),
        ("seed", -1),
        ("logprobs", -1),
        ("n", 0),
        ("thinking_budget", -1),
        ("thinking_grace", -1),
        ("ignore_eos", 1),
        ("stop_in_thinking", "yes"),
    ],
)
def test_a_bad_value_names_the_setting_the_value_and_a_way_out(field, value):
    with pytest.raises(UserError) as error:
        Sampling(**{field: value})
    text = str(error.value)
    assert field in text and repr(value) in text and f"set {field} to" in text


def test_override_replaces_and_points_to_the_nearest_name():
    base = Sampling(temperature=0.5, stop="END")
    assert base.stop == ("END",)
    changed = base.override({"max_tokens": 7, "stop": ["a", "b"]})
    assert (changed.max_tokens, changed.stop, changed.temperature) == (7, ("a", "b"), 0.5)
    with pytest.raises(UserError, match=r"'max_token'.*'max_tokens'"):
        base.override({"max_token": 7})
