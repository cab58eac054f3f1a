"""A program without standard error is told nothing, and loses nothing by it."""

import contextlib
import io
import logging
import sys
import warnings

import pytest
import torch
from ends import Thread, receiver, sender
from torch import nn

import hotweights as hw
from hotweights import notices
from hotweights.progress import progress
from hotweights.testing import assert_same_bits, write_checkpoint


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def as_python_does(message, category, filename, lineno, file=None, line=None):
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


class Gone(io.TextIOBase):
    """A terminal whose other end is gone: every call fails, and some say first that it is a terminal."""

    def __init__(self, *, says_so):
        self._says_so = says_so

    def isatty(self):
        if self._says_so:
            return True
        raise OSError("Input/output error")

    def write(self, text):
        raise OSError("Input/output error")

    def flush(self):
        raise RuntimeError("gone")


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "gone": lambda: Gone(says_so=False),
    "a terminal that is gone": lambda: Gone(says_so=True),
}


@pytest.fixture(params=STREAMS)
def no_stderr(request):
    """A ``with``, inside which there is none. pytest puts its own back between a fixture and its test."""

    @contextlib.contextmanager
    def inside():
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("always")
            patch.setattr("sys.stderr", STREAMS[request.param]())
            # pytest takes warnings and logs for itself; here they go where they go in a program.
            patch.setattr(warnings, "showwarning", as_python_does)
            patch.setattr(logging.getLogger("hotweights"), "propagate", False)
            yield

    return inside


@pytest.mark.parametrize("show", [None, True])
def test_progress(no_stderr, show):
    with no_stderr(), progress("loading", 10, show=show) as advance:
        advance(10)


def test_an_error_is_not_lost_behind_the_bar(no_stderr):
    with no_stderr(), pytest.raises(KeyError), progress("loading", 10, show=True):
        raise KeyError


def test_loads_updates_and_sends(no_stderr, tmp_path):
    address, new = f"unix:{tmp_path / 'run' / 'socket'}", nn.Linear(3, 2).state_dict()
    place = write_checkpoint(tmp_path / "checkpoint", new)
    live = hw.LiveModel(nn.Linear(3, 2))

    def receive():
        with receiver(address) as source:
            live.update(source)

    with no_stderr():
        live.load(place)
        live.update(new, show_progress=True)
        hw.load(model := nn.Linear(3, 2), place)
        thread = Thread(receive)
        with sender(address) as sending:
            sending.send(place, version="sent")
            thread.result()
    assert live.version == "sent"
    assert_same_bits(model.state_dict(), new)
    assert_same_bits(live.model.state_dict(), new)


def test_a_log(no_stderr):
    with no_stderr():
        notices.log(logging.WARNING, "said to %s", "nobody")


def test_a_log_says_where_it_is_from(caplog):
    notices.log(logging.WARNING, "said to %s", "everybody")
    (record,) = caplog.records
    assert (record.name, record.getMessage(), record.filename) == ("hotweights", "said to everybody", "test_notices.py")


def forget_a_source(place):
    kept = (source := hw.open(place))._shards[0].file
    del source
    return kept._fd < 0


def forget_a_reader(place):
    kept = (source := hw.open(place, reader="torch"))._shards[0].file
    del source
    return kept._fd < 0


def forget_an_update(place):
    live = hw.LiveModel(nn.Linear(3, 2))
    live.load(nn.Linear(3, 2).state_dict())
    update = live.begin()
    del update
    return live.state is hw.State.SERVING


FORGOTTEN = [forget_a_source, forget_a_reader, forget_an_update]


@pytest.fixture
def place(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "pytorch_model.bin")
    return write_checkpoint(tmp_path, nn.Linear(3, 2).state_dict())


@pytest.mark.parametrize("forget", FORGOTTEN, ids=lambda forget: forget.__name__)
def test_what_was_forgotten_is_closed_without_a_word(no_stderr, forget, place):
    with no_stderr():
        assert forget(place)


@pytest.mark.parametrize("forget", FORGOTTEN, ids=lambda forget: forget.__name__)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_was_forgotten_is_closed_where_warnings_are_errors(forget, place):
    with warnings.catch_warnings(), contextlib.suppress(ResourceWarning):
        warnings.simplefilter("error")
        assert forget(place)
