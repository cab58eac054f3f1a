"""DisjointSets against sets that are merged by hand."""

from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from hotweights.plan.disjoint_sets import DisjointSets

NAMES = "abcdefgh"


def test_a_name_is_alone_until_it_is_joined():
    sets = DisjointSets()
    assert sets.of("a") == "a"
    sets.join([])
    sets.join(["a"])
    assert sets.of("a") == "a"
    assert sets.of("b") == "b"


@examples(100, derandomize=True)
@given(st.lists(st.lists(st.sampled_from(NAMES), max_size=3), max_size=8))
def test_names_are_together_if_a_chain_of_groups_joins_them(groups):
    sets, merged = DisjointSets(), [{name} for name in NAMES]
    for group in groups:
        sets.join(group)
        touched = [part for part in merged if part & set(group)]
        merged = [part for part in merged if not part & set(group)]
        if touched:
            merged.append(set().union(*touched))
    for part in merged:
        assert len({sets.of(name) for name in part}) == 1
    assert len({sets.of(name) for name in NAMES}) == len(merged)
