"""verl's default path, with its real sender and vLLM workers: versions are taken whole, and senders are answered."""

import pytest
from stack import run

TAKEN = ("", -1)


@pytest.mark.parametrize(("ranks", "tied"), [(1, True), (2, False)])
def test_versions_are_taken_whole_whatever_fails(tmp_path, ranks, tied):
    fails = [("missing", 3), ("unknown", 3), ("raises", 4), *(("killed", at) for at in (0, 2, 9, 18))]
    if tied:
        fails.append(("untied", -1))
    rounds = [("B", *TAKEN), *(("A", *fail) for fail in fails), ("A", *TAKEN), ("B", "adapted", -1)]
    common = {"folder": tmp_path, "ranks": ranks, "tied": tied}
    start, first, *failed, back, last = run("colocated.py", **common, start="A", rounds=rounds)
    ((_, _, fresh_b, _),) = run("colocated.py", **common, start="B", rounds=[])
    fresh_a = start[2]
    assert fresh_a != fresh_b
    for taken, fresh in ((first, fresh_b), (back, fresh_a), (last, fresh_b)):
        assert taken[1:3] == [None, fresh]
        assert taken[3] == [0] * ranks
    words = {
        "missing": "v_proj",
        "unknown": "zz: unexpected",
        "raises": "is gone, and had not sent all",
        "killed": "is gone, and had not sent all",
        "untied": "lm_head.weight: other bytes than model.embed_tokens.weight",
    }
    for what, raised, tokens, codes in failed:
        assert words[what] in raised, what
        assert tokens == fresh_b, what
        if ranks > 1:
            assert "rank 1: " in raised
        *others, code = codes
        assert others == [0] * (ranks - 1), what
        assert code == {"killed": -9, "raises": 1}.get(what, 0), what
