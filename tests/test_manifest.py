"""Frozen facts about tensors."""

import pytest
import torch

from hotweights.dtypes import FORMAT_DTYPES, OpaqueDtype, format_name
from hotweights.errors import UsageError
from hotweights.manifest import Manifest, TensorSpec

W = TensorSpec("w", torch.bfloat16, (3, 4))
B = TensorSpec("b", torch.float32, ())
NONE = TensorSpec("none", torch.int64, (0, 5))
F6 = TensorSpec("f6", OpaqueDtype("F6_E2M3", 6), (4, 3))


def test_sizes():
    assert [spec.nbytes for spec in (W, B, NONE, F6)] == [24, 4, 0, 9]
    assert Manifest([W, B, NONE, F6]).nbytes == 37
    assert TensorSpec("c", torch.complex64, (2,)).nbytes == 16
    assert TensorSpec("f4", torch.float4_e2m1fn_x2, (2, 8)).nbytes == 16  # Pairs.
    assert TensorSpec("f4", OpaqueDtype("F4", 4), (2, 8)).nbytes == 8  # Elements.


def test_a_manifest_is_an_ordered_mapping():
    manifest = Manifest([W, NONE, B])
    assert list(manifest) == ["w", "none", "b"]
    assert manifest["w"] is W
    assert "x" not in manifest
    assert len(manifest) == 3
    assert manifest == {"b": B, "w": W, "none": NONE}
    assert repr(manifest) == "<Manifest 3 tensors, 28 bytes>"
    assert len(Manifest([])) == Manifest([]).nbytes == 0


def test_it_takes_its_specs_once():
    assert list(Manifest(spec for spec in (W, B))) == ["w", "b"]


@pytest.mark.parametrize("specs", [[W, W], [W, B, TensorSpec("w", torch.float32, (9,))], [NONE, NONE, NONE]])
def test_a_name_twice_is_refused(specs):
    assert len({spec.name: spec for spec in specs}) < len(specs)  # A dict takes the last, silently.
    with pytest.raises(UsageError, match=f"names tensors twice: {specs[0].name};"):
        Manifest(specs)


def test_facts_are_frozen():
    for fact, field in ((W, "shape"), (F6.dtype, "bits")):
        with pytest.raises(AttributeError):
            setattr(fact, field, ())
    with pytest.raises((AttributeError, TypeError)):
        Manifest([W])["w"] = B
    assert hash(W) == hash(TensorSpec("w", torch.bfloat16, (3, 4)))


def test_every_dtype_has_its_name():
    """Both ways, and at the size that the format gives it."""
    assert len(FORMAT_DTYPES) == 22
    seen = set()
    for name, (bits, attribute) in FORMAT_DTYPES.items():
        assert format_name(OpaqueDtype(name, bits)) == str(OpaqueDtype(name, bits)) == name
        if attribute:
            dtype = getattr(torch, attribute)
            assert format_name(dtype) == name
            assert dtype.itemsize * 8 == (2 * bits if attribute.endswith("_x2") else bits)
            seen.add(dtype)
    assert len(seen) == 20
    assert format_name(torch.complex128) == "complex128"  # The format has none.


def test_a_spec_reads_well():
    assert str(W) == "w: BF16 [3, 4]"
    assert str(B) == "b: F32 []"
    assert str(F6) == "f6: F6_E2M3 [4, 3]"
