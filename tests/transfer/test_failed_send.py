"""A send that failed tells where its time went, as a report of one that succeeds does."""

import threading

import pytest
import torch
from torch import nn

import hotweights as hw


def test_a_refused_version_tells_both_ends_where_the_time_went(tmp_path):
    address = f"unix:{tmp_path}/socket"
    live = hw.LiveModel(nn.Linear(2, 2))
    live.load(live.model.state_dict(), version=1)
    refused = []

    def works():
        with hw.Receiver(address, name="rank0") as receiver:
            try:
                live.update(receiver, check=lambda model: False)
            except hw.UpdateAborted as error:
                refused.append(error)

    worker = threading.Thread(target=works)
    with hw.Sender(address) as sender:
        worker.start()
        with pytest.raises(hw.TransferAborted, match="rank0") as caught:
            sender.send(nn.Linear(2, 2), version=2)
        worker.join()
    sent, received = caught.value.report, refused[0].report
    assert (sent.deed, sent.version, received.deed, received.version) == ("send", 2, "update", 2)
    assert {"wait for receivers", "wait until all are prepared"} <= {event.what for event in sent.events}
    assert {"wait for the sender", "check"} <= {event.what for event in received.events}
    assert received.receiver == "rank0"
    assert "wait" in str(sent)
    sent.save_timeline(tmp_path / "send.json")
    assert "send 2 (failed)" in (tmp_path / "send.json").read_text()


def test_nobody_came_and_the_time_is_that_of_the_wait(tmp_path):
    waited = pytest.raises(hw.TransferTimeout, match="nobody is connected to unix:")
    with hw.Sender(f"unix:{tmp_path}/socket", timeout=0.05) as sender, waited as caught:
        sender.send({"w": torch.ones(1)}, version=2)
    (event,) = caught.value.report.events
    assert event.what == "wait for receivers"
