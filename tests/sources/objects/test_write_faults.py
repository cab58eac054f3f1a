"""What a store may do wrong while it is written to: by a save, a sender, a copy; and what readers of those see."""

import pytest
import torch
from clouds import Azure
from typer.testing import CliRunner
from web import Proxy, cut, reset, silent, status

import hotweights as hw
from hotweights.cli import app
from hotweights.testing.checks import assert_same_bits

OLD = {"a": torch.arange(3000), "b": torch.arange(2000.0)}
NEW = {name: tensor + 1 for name, tensor in OLD.items()}
FAULTS = {
    "503": status(503, b"<Error><Code>ServerBusy</Code></Error>"),
    "429": status(429),
    "a reset": reset,
    "no answer": silent,
    "credentials that have expired": status(403),
}
LASTING = pytest.mark.parametrize("fault", ["503", "no answer", "credentials that have expired"])
ONCE = pytest.mark.parametrize("fault", ["503", "429", "a reset", "no answer"])
# On a slow machine the last answer may come too late to be said.
SAID = {
    "503": "503|nothing came",
    "no answer": "nothing came",
    "credentials that have expired": "403",
}
DEADLINE = 2.0  # seconds


class Bucket:
    def __init__(self, proxy, options):
        self.proxy, self.store = proxy, {**options, "endpoint": f"{proxy.url}/account", "deadline": 20}
        self.hurried = {**self.store, "deadline": DEADLINE}
        self.brief = {**self.store, "deadline": 3 * DEADLINE}  # Nearly half of it is waited for an answer.

    def read(self, where):
        with hw.open(f"az://b/{where}", store=self.store) as source:
            return dict(source.tensors())


@pytest.fixture
def bucket():
    pytest.importorskip("obstore")
    with Azure() as server, Proxy(server.url) as proxy:
        yield Bucket(proxy, server.options)


@ONCE
def test_a_save_tries_again(bucket, fault):
    hw.save(OLD, "az://b/m", shard_size=13_000, store=bucket.store)
    bucket.proxy.faults_of_writes.extend([FAULTS[fault]] * (1 if fault == "no answer" else 2))
    hw.save(NEW, "az://b/m", shard_size=13_000, store=bucket.brief)
    assert not bucket.proxy.faults_of_writes
    assert_same_bits(bucket.read("m"), NEW)


@LASTING
def test_a_save_that_goes_on_failing_is_one_error_and_the_same_save_goes_on_with_it(bucket, fault):
    hw.save(OLD, "az://b/m", shard_size=13_000, store=bucket.store)
    bucket.proxy.always_of_writes = FAULTS[fault]
    with pytest.raises(hw.SaveError, match=f"the store said: ({SAID[fault]})") as error:
        hw.save(NEW, "az://b/m", shard_size=13_000, store=bucket.hurried)
    assert "nothing was saved" in str(error.value)
    bucket.proxy.always_of_writes = None
    assert_same_bits(bucket.read("m"), OLD)
    hw.save(NEW, "az://b/m", shard_size=13_000, store=bucket.store)
    assert_same_bits(bucket.read("m"), NEW)


@ONCE
def test_a_sender_tries_again(bucket, fault):
    with (
        hw.Sender("az://b/run", store=bucket.brief) as sender,
        hw.Receiver("az://b/run", store=bucket.store) as receiver,
    ):
        sender.send(OLD, version=1)
        bucket.proxy.faults_of_writes.extend([FAULTS[fault]] * (1 if fault == "no answer" else 2))
        sender.send(NEW, version=2)
        assert not bucket.proxy.faults_of_writes
        assert receiver.poll() == 2
        assert_same_bits(dict(receiver.tensors()), NEW)


@pytest.mark.parametrize("fault", ["no answer", "credentials that have expired"])
def test_a_send_that_goes_on_failing_publishes_nothing_and_the_next_one_does(bucket, fault):
    with (
        hw.Sender("az://b/run", store=bucket.hurried) as sender,
        hw.Receiver("az://b/run", store=bucket.store, interval=0.001) as receiver,
    ):
        sender.send(OLD, version=1)
        bucket.proxy.always_of_writes = FAULTS[fault]
        with pytest.raises((hw.SaveError, hw.StoreError), match=SAID[fault]):
            sender.send(NEW, version=2)
        bucket.proxy.always_of_writes = None
        assert receiver.poll() == 1
        assert_same_bits(dict(receiver.tensors()), OLD)
        sender.send(NEW, version=3)
        assert receiver.poll() == 3
        assert_same_bits(dict(receiver.tensors()), NEW)


@pytest.mark.parametrize("fault", ["503", "credentials that have expired"])
def test_a_poll_that_fails_is_an_error_and_the_next_one_takes_the_version(bucket, fault):
    with hw.Sender("az://b/run", store=bucket.store) as sender:
        sender.send(OLD, version=1)
    with hw.Receiver("az://b/run", store=bucket.hurried, interval=0.001) as receiver:
        bucket.proxy.always = FAULTS[fault]
        with pytest.raises(hw.StoreError, match=SAID[fault]):
            receiver.poll()
        bucket.proxy.always = None
        assert receiver.poll() == 1
        assert_same_bits(dict(receiver.tensors()), OLD)


@pytest.mark.parametrize("fault", ["503", "429", "a reset", "a body that is cut"])
def test_the_commands_try_again(bucket, fault, monkeypatch, tmp_path):
    variables = {"STORAGE_ACCOUNT_NAME": "account", "ENDPOINT": bucket.store["endpoint"], "SKIP_SIGNATURE": "true"}
    for name, value in {**variables, "ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(f"AZURE_{name}", value)
    hw.save(OLD, "az://b/m", shard_size=13_000, store=bucket.store)
    hw.save(OLD, tmp_path / "m")
    for command in (
        ["diff", "az://b/m", str(tmp_path / "m")],
        ["verify", "az://b/m"],
        ["copy", "az://b/m", "az://b/copy"],
    ):
        bucket.proxy.faults.append({**FAULTS, "a body that is cut": cut(0.5)}[fault])
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output)
        assert not bucket.proxy.faults, command
    assert_same_bits(bucket.read("copy"), OLD)
