"""Hooks: all are called whatever fails, and an interruption is raised before all else."""

from hotweights import CommitHookError
from hotweights.live.hooks import Hooks


def raising(error, calls):
    def hook(version):
        calls.append(version)
        raise error

    return hook


def test_all_are_called_and_all_failures_told():
    hooks, calls, failures = Hooks(), [], []
    hooks.add(raising(ValueError("first"), calls))
    hooks.add(calls.append)
    hooks.add(raising(OSError("third"), calls))
    hooks.call("step-1", failures)
    assert calls == ["step-1"] * 3
    told, *rest = failures
    assert isinstance(told, CommitHookError)
    assert [type(error) for error in rest] == [ValueError, OSError]
    assert told.__cause__ is rest[0]
    assert any("first" in problem for problem in told.problems)
    assert any("third" in problem for problem in told.problems)


def test_an_interruption_comes_first():
    hooks, failures = Hooks(), []
    for error in (ValueError(), KeyboardInterrupt()):
        hooks.add(raising(error, []))
    hooks.call(1, failures)
    assert [type(error) for error in failures] == [KeyboardInterrupt, CommitHookError, ValueError]


def test_nothing_is_told_where_nothing_fails():
    hooks, failures = Hooks(), []
    hooks.add(lambda version: None)
    hooks.call(1, failures)
    assert failures == []
