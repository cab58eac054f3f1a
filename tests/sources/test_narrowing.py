"""Casts that lose something: what is refused, what is counted, and what comes out."""

import pytest
import torch

import hotweights as hw

FLOATS = [
    getattr(torch, name)
    for name in (*("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),)
]


def saved(values, place, dtype, **how):
    state = values if isinstance(values, dict) else {"w": torch.tensor(values, dtype=torch.float64)}
    report = hw.save(state, place, dtype=dtype, **how)
    with hw.open(place) as source:
        return report, {name: tensor.double() for name, tensor in source.tensors()}


@pytest.mark.parametrize("dtype", FLOATS)
class TestTheLargestValue:
    def test_what_is_rounded_to_it_is_not_out_of_range(self, dtype, tmp_path):
        largest = torch.finfo(dtype).max
        for value in (largest, -largest, largest * (1 + torch.finfo(dtype).eps / 16)):
            report, read = saved([value], tmp_path / "a", dtype)
            assert read["w"].abs().tolist() == [largest]
            assert not any("beyond" in warning for warning in report.warnings)

    @pytest.mark.parametrize("factor", [1.2, -2, 1e30])
    def test_what_is_beyond_it(self, factor, dtype, tmp_path):
        largest = torch.finfo(dtype).max
        values = [1.0, largest * factor, torch.nan]
        with pytest.raises(hw.SaveError, match=r"tensor 'w': 1 of 3 values are beyond"):
            hw.save({"w": torch.tensor(values, dtype=torch.float64)}, tmp_path / "a", dtype=dtype)
        assert list(tmp_path.iterdir()) == []
        report, read = saved(values, tmp_path / "a", dtype, overflow="saturate")
        assert read["w"].tolist()[:2] == [1.0, largest if factor > 0 else -largest]
        assert read["w"][2].isnan()
        assert any("1 of 3 values were beyond" in warning for warning in report.warnings)

    def test_infinite_values(self, dtype, tmp_path):
        """They stay where the dtype has them, and are out of range where it does not."""
        values = [torch.inf, -torch.inf]
        if dtype in (torch.float16, torch.bfloat16, torch.float8_e5m2):
            assert saved(values, tmp_path / "a", dtype)[1]["w"].tolist() == values
            return
        with pytest.raises(hw.SaveError, match="2 of 2 values"):
            hw.save({"w": torch.tensor(values)}, tmp_path / "a", dtype=dtype)
        read = saved(values, tmp_path / "a", dtype, overflow="saturate")[1]
        assert read["w"].tolist() == [torch.finfo(dtype).max, -torch.finfo(dtype).max]


def test_all_tensors_are_named_together(tmp_path):
    state = {"a": torch.full((3,), 1e6), "b": torch.ones(2), "c": torch.tensor([1.0, -7e4])}
    with pytest.raises(hw.SaveError) as error:
        hw.save(state, tmp_path / "a", dtype=torch.float16)
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["tensor 'a'", "tensor 'c'"]
    assert "3 of 3" in error.value.problems[0]
    assert "largest is 1e+06" in error.value.problems[0]
    hw.save(state, tmp_path / "a", dtype=torch.bfloat16)  # as the error says
    hw.save(state, tmp_path / "b", dtype=torch.float16, overflow="saturate")


def test_counts_of_a_tensor_that_is_looked_at_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("hotweights.sources.narrowing._ELEMENTS", 3)
    values = torch.tensor([[1e6, 1.0, 1e-30, 2.0], [1e7, 0.0, 1e-30, 3.0]])
    report, read = saved({"w": values}, tmp_path / "a", torch.float16, overflow="saturate")
    assert read["w"].tolist() == [[65504, 1, 0, 2], [65504, 0, 0, 3]]
    assert [warning.partition(" values")[0] for warning in report.warnings] == ["2 of 8", "2 of 8"]


def test_what_became_0(tmp_path):
    report, read = saved({"x": torch.tensor([1e-9, 0.0]), "y": torch.full((4,), 1e-9)}, tmp_path / "a", torch.float16)
    assert not read["x"].any()
    (warning,) = report.warnings
    assert warning == "5 of 6 values became 0, too small for F16; most, 4, in 'y'"


@pytest.mark.parametrize("dtype", FLOATS)
def test_8_bits_without_scales_are_said(dtype, tmp_path):
    report, _ = saved([1.0], tmp_path / "a", dtype)
    if dtype.itemsize == 2:
        assert report.warnings == ()
    else:
        (warning,) = report.warnings
        assert "is written without scales: 1 tensors keep" in warning
        assert warning in str(report)


def test_nothing_is_lost_is_not_said(tmp_path):
    state = {"w": torch.tensor([1.0, torch.inf]).half(), "n": torch.tensor([3])}
    assert (
        saved({"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)}, tmp_path / "c", torch.float16)[0].warnings
        == ()
    )
    assert saved(state, tmp_path / "a", torch.float32)[0].warnings == ()
    assert saved({"q": torch.ones(2).to(torch.float8_e5m2)}, tmp_path / "b", torch.float8_e4m3fn)[0].warnings == ()


def test_the_same_bytes_as_of_a_plain_cast(tmp_path):
    for dtype in FLOATS:
        for source in (torch.float64, torch.float32, torch.bfloat16):
            values = torch.linspace(-100, 100, 4001).to(source)
            assert torch.equal(saved({"w": values}, tmp_path / "a", dtype)[1]["w"], values.to(dtype).double())


@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_dtypes_that_nothing_is_cast_to(name, tmp_path):
    if not hasattr(torch, name):
        pytest.skip("this torch has none")
    with pytest.raises(hw.UsageError, match="no dtype that weights are cast to"):
        hw.save({"w": torch.ones(2)}, tmp_path / "a", dtype=getattr(torch, name))


def test_unknown_overflow(tmp_path):
    with pytest.raises(hw.UnknownName, match="error, saturate"):
        hw.save({"w": torch.ones(2)}, tmp_path / "a", overflow="inf")


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_of_both_signs_and_nan_did_not_become_0(dtype, tmp_path):
    report, read = saved([0.0, -0.0, torch.nan, 1e-300, -1e-300, 1.0], tmp_path / "a", dtype)
    assert any(warning.startswith("2 of 6 values became 0") for warning in report.warnings)
    assert read["w"].isnan().tolist() == [False, False, True, False, False, False]
