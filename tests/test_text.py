"""Text for people."""

from hotweights.text import size, some, summary, table

NAMES = ("a", "b", "c", "d", "e")


def test_some_names_and_how_many_more():
    assert some(NAMES) == "a, b, c, d, e"
    assert some(NAMES, 5) == "a, b, c, d, e"
    assert some(NAMES, 2) == "a, b and 3 more"
    assert some([]) == ""


def test_a_table_is_as_wide_as_its_longest_label():
    assert table([("a", "1"), ("loaded", "2")], width=4) == "     a  1\nloaded  2"
    assert table([("a", "1")], width=4) == "   a  1"
    assert table([]) == ""


def test_sizes():
    assert [size(nbytes) for nbytes in (0, 999, 1000, 90_900_000, 3 * 10**9, 2 * 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "90.9 MB",
        "3.0 GB",
        "2000.0 TB",
    ]


def test_many_names_are_counted_and_casts_are_shown():
    assert summary(NAMES, {}) == "5 tensors"
    assert summary(NAMES[:2], {}) == "2: a, b"
    assert summary(NAMES, {"b": "F32 to BF16"}) == "5: a, b (F32 to BF16), c and 2 more"
