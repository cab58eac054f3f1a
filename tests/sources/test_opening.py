"""Whatever a caller may give as a source becomes an open one, and only what was opened here is closed here."""

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.sources.opening import is_pairs, opened
from hotweights.testing import write_checkpoint

STATE = {"weight": torch.randn(2, 2), "bias": torch.randn(2)}


def module():
    model = nn.Linear(2, 2)
    model.load_state_dict(STATE)
    return model


@pytest.fixture(params=["path", "str", "mapping", "module"])
def named(request, tmp_path):
    path = write_checkpoint(tmp_path, STATE)
    return {"path": path, "str": str(path), "mapping": STATE, "module": module()}[request.param]


def test_what_is_opened_here_is_closed_here(named):
    assert not is_pairs(named)
    with opened(named) as source:
        assert torch.equal(dict(source.tensors())["weight"], STATE["weight"])
    with pytest.raises(hw.Closed):
        list(source.tensors())


def test_an_open_source_stays_open():
    with hw.open(STATE) as source:
        with opened(source) as given:
            assert given is source
        assert len(list(source.tensors())) == 2
        assert not is_pairs(source)


def test_an_iterator_without_a_manifest_is_collected():
    with hw.from_iterator(STATE.items()) as iterator, opened(iterator) as source:
        assert set(source.manifest) == set(STATE)
    with hw.from_iterator(STATE.items(), hw.open(STATE).manifest) as iterator, opened(iterator) as source:
        assert source is iterator


@pytest.mark.parametrize("pairs", [list(STATE.items()), iter(STATE.items()), STATE.items()])
def test_bare_pairs_go_elsewhere(pairs):
    assert is_pairs(pairs)
    with pytest.raises(hw.UsageError, match=r"goes through hotweights\.from_iterator"), opened(pairs):
        pass


def test_an_open_source_needs_no_opening():
    with hw.open(STATE) as source, pytest.raises(hw.UsageError, match="this StateSource is an open source; use it as"):
        hw.open(source)


def test_a_sender_takes_whatever_load_takes(tmp_path):
    """Also an iterator without a manifest, and no receiver need be there to refuse what is no source."""
    with hw.Sender(f"unix:{tmp_path}/socket", timeout=0.01) as sender:
        with pytest.raises(hw.UsageError, match=r"a source is a path.*this is a int"):
            sender.send(5, version=1)
        with hw.from_iterator(STATE.items()) as iterator, pytest.raises(hw.TransferTimeout):
            sender.send(iterator, version=1)
