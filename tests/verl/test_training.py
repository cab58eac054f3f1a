"""A whole tiny training by verl's own trainer, on a CPU: what it validates with is what it has trained."""

from stack import run


def test_a_training_with_an_engine(tmp_path):
    said = run("training.py", folder=tmp_path)
    assert sorted(said) == ["0", "1", "2"]
    assert said["0"] != said["1"] != said["2"]
    for step in "12":
        saved = f"{tmp_path}/saved/global_step_{step}/actor/huggingface"
        assert said[step] == run("training.py", folder=tmp_path, path=saved), f"after step {step}"
