"""Stop strings: what comes out, whatever the pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.generation.stopping import StopStrings


def shown(strings, pieces):
    """All that is shown, and whether the text was stopped."""
    watch, text = StopStrings(strings), ""
    for piece in pieces:
        more, stopped = watch.push(piece)
        text += more
        if stopped:
            return text, True
    return text + watch.flush(), False


@pytest.mark.parametrize(
    ("strings", "pieces", "expected"),
    [
        ([], ["ab", "c"], ("abc", False)),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", True)),
        (["END"], ["aE", "N", "D"], ("a", True)),
        (["END"], ["aE", "N"], ("aEN", False)),
        (["END"], ["aEEND"], ("aE", True)),
        (["aab"], ["a", "a", "a", "b"], ("a", True)),
        (["abcd", "bc"], ["abcd"], ("a", True)),  # the one that ends first
        (["bc", "abc"], ["xabcd"], ("x", True)),  # of those that end together the longest
        (["END"], ["some END and END"], ("some ", True)),
    ],
)
def test_examples(strings, pieces, expected):
    assert shown(strings, pieces) == expected


def test_nothing_of_a_stop_string_is_shown_early():
    watch = StopStrings(["STOP", "TOUR"])
    assert watch.push("a S") == ("a ", False)
    assert watch.push("T") == ("", False)
    assert watch.push("OU") == ("S", False)  # no STOP, but TOU may become TOUR
    assert watch.push("R!") == ("", True)


words = st.text("ab", min_size=1, max_size=4)


@settings(deadline=None)
@given(st.lists(words, max_size=3), st.text("abc", max_size=20), st.data())
def test_cuts_make_no_difference(strings, text, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert shown(strings, pieces) == shown(strings, list(text))


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=3), st.text("abc", max_size=20))
def test_what_is_shown_has_no_stop_string_and_is_how_the_text_begins(strings, text):
    made, stopped = shown(strings, list(text))
    assert text.startswith(made)
    assert not any(string in made for string in strings)
    assert stopped == any(string in text for string in strings)
    assert stopped or made == text


@pytest.mark.parametrize(
    ("strings", "error", "message"),
    [
        ([""], ValueError, "empty string"),
        (None, TypeError, "stop_strings is None; expected a sequence"),
        ("END", TypeError, "'END'; expected a sequence"),
        ([1], TypeError, r"\[1\]; expected a sequence of strings"),
    ],
)
def test_errors(strings, error, message):
    with pytest.raises(error, match=message):
        StopStrings(strings)
