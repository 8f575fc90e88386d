"""How methods are named on the page."""

import pytest

from coterie.records.wording import listed
from coterie.report.wording import method_name, short


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("token-level", "token-level"),
        ("token-level:every=1", "token-level, every token"),
        ("token-level:every=2", "token-level, every 2nd token"),
        ("token-level:every=3", "token-level, every 3rd token"),
        ("token-level:every=4", "token-level, every 4th token"),
        ("token-level:every=11", "token-level, every 11th token"),
        ("token-level:every=21", "token-level, every 21st token"),
        ("token-level:every=112", "token-level, every 112th token"),
        ("token-level:every=inf", "token-level, prompt only"),
        ("token-level:every=0", "token-level:every=0"),
        ("token-level:every=x", "token-level:every=x"),
        ("token-level-published", "token-level, published"),
        ("token-level-published:every=2", "token-level, published, every 2nd token"),
        ("expert:maths", "maths alone"),
        ("elrea:top_k=2", "elrea:top_k=2"),
        *((name, name) for name in ("arrow", "spectr", "uniform-weights", "per-dataset", "base")),
    ],
)
def test_a_method_is_called_in_words(method, words):
    assert method_name(method) == words


def test_a_shortened_name_goes_on_with_a_whole_word_where_one_begins_soon():
    assert short("token-level, every 2nd token", 24) == "token-level,…2nd token"
    assert short("a-name-without-any-space until-here", 24) == "a-name-witho…until-here"
    assert short("a-name-that-is-very-long-up-to-a b", 24) == "a-name-that-…g-up-to-a b"


def test_names_with_commas_are_listed_between_semicolons():
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["a", "b, c", "d"]) == "a; b, c; and d"
    assert (listed(["b, c"]), listed([])) == ("b, c", "")
