"""Stop strings, cut anywhere."""

from hypothesis import given
from hypothesis import strategies as st

from whimbrel.engine.stop import Stops


def pieces_of(data, text):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(
    st.data(),
    st.text("ab<", max_size=14),
    st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_cut_shows_the_text_before_the_first_stop(data, text, strings):
    stops, shown = Stops(tuple(strings)), ""
    for piece in pieces_of(data, text):
        shown += stops.push(piece)
        assert not any(string in shown for string in strings), "a stop string is never shown"
    shown += stops.flush()
    places = [text.find(string) for string in strings if string in text]
    if stops.hit is None:
        assert not places and shown == text
    else:
        assert stops.hit in strings and text.startswith(shown + stops.hit)
        # A piece may end inside a longer string that began earlier; nothing past a complete one is shown.
        assert len(shown) <= max(places)


def test_text_that_may_become_a_stop_waits_and_other_text_does_not():
    stops = Stops(("###",))
    assert stops.push("so#") == "so"
    assert stops.push("#") == ""
    assert stops.push(" x") == "## x"
    assert stops.push("y###z") == "y" and stops.hit == "###"
    assert stops.push("more") == "" and stops.flush() == ""
