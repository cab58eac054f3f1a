"""checkpoint-engine's parameter server updates an engine of vLLM, all or nothing."""

from pathlib import Path

import pytest
from stack import run


@pytest.mark.timeout(1800)
def test_an_engine_takes_versions_whole_whatever_fails(tmp_path):
    script = str(Path(__file__).parent / "engine.py")
    fails = [("missing", None), ("unknown", None), ("", 1), ("", 2), ("", 4)]
    rounds = [("B", "", None), *(("A", *fail) for fail in fails), ("A", "", None)]
    start, first, missing, unknown, *died, last = run(script, folder=tmp_path, start="A", rounds=rounds)
    ((_, fresh_b, _),) = run(script, folder=tmp_path, start="B", rounds=[])
    fresh_a = start[1]
    assert fresh_a != fresh_b
    assert first == [None, fresh_b, None]
    assert last == [None, fresh_a, None]
    assert "up_proj" in missing[0]
    assert "a.weight: unexpected" in unknown[0]
    assert "remote errors" in unknown[2]
    assert all("is gone, and had not sent all" in words for words, _, _ in died)
    assert all(tokens == fresh_b for _, tokens, _ in (missing, unknown, *died))
