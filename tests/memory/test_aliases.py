"""Which tensors are one, and which merely share bytes."""

import torch

from hotweights.memory.aliases import overlaps, owners


def test_tied_tensors_have_one_owner():
    weight = torch.zeros(4, 4)
    tensors = {"embed": weight, "head": weight.view(4, 4), "other": torch.zeros(4, 4), "half": weight[:2]}
    assert owners(tensors) == {"embed": "embed", "head": "embed", "other": "other", "half": "half"}


def test_views_that_are_conjugated_or_negated_are_not_the_tensor():
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert owners({"a": values, "b": values.conj(), "c": values.conj()}) == {"a": "a", "b": "b", "c": "b"}
    assert owners({"a": values.imag, "b": values.conj().imag}) == {"a": "a", "b": "b"}
    assert list(overlaps({"a": values, "b": values.conj()})) == [("a", "b")]


def test_meta_and_empty_tensors_are_one_only_as_objects():
    meta, empty = torch.zeros(2, device="meta"), torch.empty(0)
    tensors = {"a": meta, "b": meta, "c": torch.zeros(2, device="meta"), "d": empty, "e": torch.empty(0)}
    assert owners(tensors) == {"a": "a", "b": "a", "c": "c", "d": "d", "e": "e"}
    assert list(overlaps(tensors)) == []


def test_overlaps_are_found_byte_by_byte():
    wide, other = torch.zeros(4, 6), torch.zeros(100)
    tensors = {
        "left": wide[:, :3],
        "right": wide[:, 3:],  # interleaved with left in memory, and disjoint
        "row": wide[1],  # crosses both
        "other": other,
        "middle": other[10:20],
        "tied": other.view(100),
    }
    assert {frozenset(pair) for pair in overlaps(tensors)} == {
        frozenset({"left", "row"}),
        frozenset({"right", "row"}),
        frozenset({"other", "middle"}),
        frozenset({"tied", "middle"}),
    }


def test_neighbours_in_one_storage_do_not_overlap():
    fused = torch.zeros(12, 4)
    assert list(overlaps({"q": fused[:4], "k": fused[4:8], "v": fused[8:]})) == []
