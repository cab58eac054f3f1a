"""verl's manager brings versions from trainers to rollouts by our checkpoint engine: all of them, or none."""

from stack import run


def test_all_rollouts_take_a_version_or_none_does(tmp_path):
    one, two, three, refused, next_, failed, after, died, new = run("disaggregated.py", folder=tmp_path)
    for step, taken in ((1, one), (2, two), (3, three), (5, next_), (7, after), (9, new)):
        assert taken["words"] is None
        assert taken["held"] == [[step, True]] * 2
        assert taken["metrics"]["hotweights/bytes"] > 1 << 20
    assert "the rollout could not load this" in refused["words"] or "rollout 1 stopped reading" in refused["words"]
    assert "the trainer's disk is full" in failed["words"]
    assert died["words"]
    for before, without in ((3, refused), (5, failed), (7, died)):
        assert [steps for steps, _ in without["held"]] == [before] * 2
        assert without["seconds"] < 60, "whoever waited was told"
