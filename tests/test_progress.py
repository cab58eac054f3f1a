"""Progress is drawn on a terminal and in a notebook, and nowhere else."""

import builtins
import io
import sys
from types import ModuleType

import pytest
import torch

import hotweights as hw
from hotweights.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_only_on_a_terminal(monkeypatch):
    for stream, drawn in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr("sys.stderr", stream)
        with progress("loading", 1000) as advance:
            advance(400)
            advance(600)
        assert bool(stream.getvalue()) == drawn


def test_the_caller_decides(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress("loading", 1000, show=False) as advance:
        advance(1000)
    assert not terminal.getvalue()


class ZMQInteractiveShell:
    """By this name rich knows a notebook."""


@pytest.fixture
def notebook(monkeypatch):
    """A notebook as rich sees one. What is displayed is noted: widgets, and bars inside them."""
    shown = []

    class Output:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def clear_output(self, wait):
            assert wait

        def close(self):
            shown.append("closed")

    ipython, display, widgets = ModuleType("IPython"), ModuleType("IPython.display"), ModuleType("ipywidgets")
    display.display = lambda what: shown.append(what if isinstance(what, Output) else what._repr_mimebundle_([], []))
    ipython.display, widgets.Output = display, Output
    for module in (ipython, display, widgets):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    return shown


def test_in_a_notebook(notebook, capsys):
    with progress("loading", 1000) as advance:
        advance(1000)
    assert "closed" in notebook
    assert any("loading" in str(what) for what in notebook)
    assert capsys.readouterr() == ("", "")


def test_in_a_notebook_the_caller_decides(notebook):
    with progress("loading", 1000, show=False) as advance:
        advance(1000)
    assert notebook == []


@pytest.mark.parametrize("show", [None, True])
def test_a_notebook_without_widgets_shows_nothing_and_warns_of_nothing(show, notebook, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with progress("loading", 1000, show=show) as advance:
        advance(1000)
    assert notebook == []


def test_a_kernel_that_is_gone_loses_no_load(notebook, monkeypatch):
    def gone(what):
        raise ConnectionError("the kernel is gone")

    monkeypatch.setattr(sys.modules["IPython.display"], "display", gone)
    model = torch.nn.Linear(2, 2)
    hw.load(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert model.bias.tolist() == [1, 1]


def test_in_ipython_without_a_notebook_it_is_as_elsewhere(notebook, monkeypatch, capsys):
    monkeypatch.setattr(builtins, "get_ipython", type("TerminalInteractiveShell", (), {}))
    with progress("loading", 1000) as advance:
        advance(1000)
    assert notebook == []
    assert capsys.readouterr() == ("", "")
