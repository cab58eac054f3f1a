"""A process of the demo that cannot go on says why, and the demo ends with its words."""

import multiprocessing

import pytest
import torch

import hotweights as hw
from hotweights.cli.demo import transfer
from hotweights.testing import write_checkpoint


def test_a_trainer_that_cannot_send_says_so(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise hw.TransferTimeout("1 of 2 receivers were there after 60 s")

    write_checkpoint(tmp_path, {"w": torch.ones(2)})
    monkeypatch.setattr(transfer, "Sender", refuse)
    monkeypatch.setattr(transfer, "_modest", lambda: None)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with ours, theirs:
        transfer._train(theirs, tmp_path, "unix:unused", ("step-1",), None)
        process = transfer._Process.__new__(transfer._Process)
        process._pipe = ours
        with pytest.raises(hw.CheckpointError, match="the trainer: TransferTimeout: 1 of 2 receivers"):
            process.heard()
