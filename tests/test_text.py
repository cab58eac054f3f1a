"""Sizes, lists of names and tables as people read them."""

import pytest

from hotweights.text import as_html, counts, short, size, some, summary, table


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90_900_000, "90.9 MB"), (10**12, "1.0 TB"), (10**16, "10000.0 TB")],
)
def test_sizes(nbytes, words):
    assert size(nbytes) == words


def test_the_rest_of_the_names_is_counted():
    assert some(list("abc"), 3) == "a, b, c"
    assert some(list("abcd"), 3) == "a, b, c and 1 more"
    assert some([]) == ""


def test_labels_are_in_a_column():
    assert table([("a", "one"), ("longer than ten", "two")]) == "              a  one\nlonger than ten  two"
    assert table([("a", "one")], width=3) == "  a  one"
    assert table([]) == ""


def test_casts_are_always_named():
    assert summary(("a", "b"), {"b": "F32 to BF16"}) == "2: a, b (F32 to BF16)"
    assert summary(("a", "b", "c", "d"), {}) == "4 tensors"
    assert summary(("a", "b", "c", "d"), {"a": "F32 to BF16"}) == "4: a (F32 to BF16), b, c and 1 more"


def test_what_is_counted():
    assert counts({"written": 104, "lost": 0, "warnings": 1}) == "104 written, 1 warning"
    assert counts({}) == ""


def test_long_values_are_cut_in_their_middle():
    assert short("v1") == "'v1'"
    assert short("a" * 21 + "b" * 21) == "'" + "a" * 19 + "..." + "b" * 19 + "'"


def test_notebooks_show_what_is_printed():
    assert as_html("a < b\n") == "<pre>a &lt; b\n</pre>"
