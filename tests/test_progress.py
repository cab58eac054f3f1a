"""Progress is drawn on a terminal, and nowhere else."""

import io

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
