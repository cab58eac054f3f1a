"""status and the log: how a live model is, as plain data; and one line for each update."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from served import live_model, version_of

import hotweights as hw


def numbers(live):
    status = live.status()
    assert json.loads(json.dumps(status)) == status
    return status["version"], status["state"], status["committed"], status["failed"]


def test_status_is_plain_data(caplog):
    model = live_model(keep_previous=True)
    status = model.status()
    assert numbers(model) == (1, "serving", 1, 0)
    assert (status["last_error"], status["seconds_since_error"]) == (None, None)
    report = model.update(version_of(2), version="two")
    assert model.status()["last_report"] == report.as_dict()
    assert numbers(model) == ("two", "serving", 2, 0)
    with pytest.raises(hw.UpdateAborted) as caught:
        model.update({"strange": torch.zeros(1)})
    status = model.status()
    assert numbers(model) == ("two", "serving", 2, 1)
    assert status["last_error"] == str(caught.value).splitlines()[0]
    assert status["seconds_since_error"] <= status["seconds_since_commit"]
    with model.begin() as update:
        assert numbers(model) == ("two", "updating", 2, 1)
        update.feed(version_of(3))
        update.prepare()
        assert numbers(model) == ("two", "prepared", 2, 1)
    assert numbers(model) == ("two", "serving", 2, 1)  # Its user left it: nothing failed.


def test_an_empty_model_has_a_status():
    live = hw.LiveModel(torch.nn.Linear(2, 2))
    assert numbers(live) == (None, "empty", 0, 0)
    assert live.status()["last_report"] is live.status()["seconds_since_commit"] is None
    with pytest.raises(ValueError, match="no more"):
        live.load(hw.from_iterator(broken(), hw.open(live.model).manifest))
    assert numbers(live) == (None, "empty", 0, 1)
    assert live.status()["last_error"] == "the first load failed: no more"


def broken():
    yield "weight", torch.zeros(2, 2)
    raise ValueError("no more")


def fails_by_check(live):
    live.update(version_of(2), check=lambda model: False)


def fails_by_source(live):
    live.update("/nowhere")


def fails_by_feed(live):
    with live.begin() as update:
        update.feed([("strange", torch.zeros(1))])


def fails_by_user(live):
    with live.begin() as update:
        update.feed(version_of(2))
        raise ValueError("of the user's own")


@pytest.mark.parametrize("act", [fails_by_check, fails_by_source, fails_by_feed, fails_by_user])
def test_each_failure_is_counted_once_and_says_one_line(act, caplog):
    live = live_model()
    with caplog.at_level(logging.INFO, "hotweights"), pytest.raises((hw.UpdateAborted, ValueError)) as caught:
        act(live)
    assert numbers(live) == (1, "serving", 1, 1)
    ((level, line),) = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert level == logging.WARNING
    assert line == str(caught.value).splitlines()[0] == live.status()["last_error"]


def test_each_version_says_one_line(caplog):
    live = live_model(keep_previous=True)
    with caplog.at_level(logging.INFO, "hotweights"):
        report = live.update(version_of(2), version=2)
        live.rollback()
    update, rollback = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert update[0] == rollback[0] == logging.INFO
    assert update[1].startswith(f"version 2 is live, it was 1: {report.bytes_read} B read, ")
    assert rollback[1] == "version 1 is live again"


def test_a_hook_that_fails_is_the_last_error_of_a_version_that_is_live(caplog):
    live = live_model()
    live.on_commit(lambda version: 1 / 0)
    with caplog.at_level(logging.INFO, "hotweights"), pytest.raises(hw.CommitHookError):
        live.update(version_of(2), version=2)
    assert numbers(live) == (2, "serving", 2, 0)
    assert "ZeroDivisionError" in live.status()["last_error"]
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]


def test_a_failure_is_not_said_twice_where_nobody_has_set_up_logging():
    code = """
import hotweights as hw, torch
live = hw.LiveModel(torch.nn.Linear(2, 2))
live.load({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
try:
    live.update({"weight": torch.ones(2, 2)})
except hw.UpdateAborted:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_rollback_is_the_last_act():
    """A health endpoint shows what is live and how it came: not the report of a version that was taken back."""
    live = live_model(keep_previous=True)
    first = live.status()["last_report"]
    assert live.status()["last_act"] == "load"
    live.update(version_of(2), version="two")
    live.rollback()
    status = live.status()
    assert (status["version"], status["last_act"], status["taken_back"]) == (1, "rollback", "two")
    assert status["last_report"] == first
    with pytest.raises(hw.UpdateAborted, match="version 'three' has a source that cannot be opened; version 1 is live"):
        live.update("/nowhere", version="three")
    assert (live.status()["last_act"], live.status()["taken_back"]) == ("failure", "two")
    with pytest.raises(hw.UpdateAborted, match=r"version 'four' has a source that broke while it was read.*no more"):
        live.update(hw.from_iterator(broken()), version="four")
    live.update(version_of(3), version="three")
    status = live.status()
    assert (status["last_act"], status["taken_back"], status["last_report"]["version"]) == ("update", None, "three")


def test_a_version_that_has_no_name_yet_is_the_update():
    live = live_model()
    with pytest.raises(hw.UpdateAborted, match="the update failed; version 1 is live: "), live.begin() as update:
        update.feed([("strange", torch.zeros(1))])
    with pytest.raises(hw.UpdateAborted, match="version 'two' failed; version 1 is live: "), live.begin() as update:
        update.commit("two")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ctrl_c_ended_is_named_with_what_is_live(error, caplog):
    def check(model):
        raise error

    live = live_model()
    with pytest.raises(type(error)):
        live.update(version_of(2), version="s2", check=check)
    said = f"version 's2' was ended by {type(error).__name__}; version 1 is live"
    assert live.status()["last_error"] == said == caplog.records[-1].getMessage()
    with pytest.raises(type(error)), live.begin():
        raise error
    assert live.status()["last_error"] == said.replace("version 's2'", "the update")
    first = hw.LiveModel(torch.nn.Linear(2, 2))
    with pytest.raises(type(error)), hw.from_iterator(ended(error), hw.open(first.model).manifest) as source:
        first.load(source)
    assert first.status()["last_error"] == f"the first load was ended by {type(error).__name__}; nothing was loaded"
    live.on_commit(lambda version: check(None))
    with pytest.raises(type(error)):
        live.update(version_of(3), version="s3")
    assert live.status()["last_error"] == f"version 's3' is live; {type(error).__name__} came during its commit"


def ended(error):
    yield "weight", torch.zeros(2, 2)
    raise error


def test_a_version_has_a_name():
    live = live_model()
    with pytest.raises(hw.UsageError, match="name is not empty"):
        live.update(version_of(2), version="")
    live.update(version_of(2))
    assert live.version == 2
