"""A cluster of one host: both ends need nothing but a name. Keys, relays by hand, and what goes wrong."""

import glob
import os
import subprocess
import sys
import time

import pytest
from ends import Thread, receiver, sender
from processes import Tiny, value_of
from workers import Trainer, Worker

import hotweights as hw
from hotweights.engines.ray import start_relays, whereabouts
from hotweights.transfer.endpoint import endpoint_of
from hotweights.transfer.handed_keys import KeyChest, files_of
from hotweights.transfer.relay import Relay
from hotweights.transfer.resolve import Resolver

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own files
]


def left():
    """Sockets of ours in the folder of Ray's session."""
    return glob.glob("/tmp/ray/session_latest/hotweights-*/socket")


def test_actors_need_only_the_name_and_a_killed_trainer_is_replaced(node):
    workers = [node.remote(num_cpus=0)(Worker).remote("ray:job", f"rank{number}") for number in range(2)]
    for version in (1, 2):
        trainer = node.remote(num_cpus=0)(Trainer).remote("ray:job", receivers=2)
        taking = [worker.take.remote() for worker in workers]
        committed, network, said = node.get(trainer.send.remote(version))
        assert (sorted(name[:5] for name in committed), network, said) == (["rank0", "rank1"], 0, "")
        assert node.get(taking) == [(version, float(version), "")] * 2
        assert node.get(trainer.address.remote()) == "ray:job"
        assert not whereabouts("ray:job").relays  # One host needs none.
        with pytest.raises(hw.AddressTaken, match=r"ray:job is held by another sender, process \d+ on"):
            hw.Sender("ray:job")
        node.kill(trainer)
    with hw.Sender("ray:job", receivers=2) as sending:
        taking = [worker.take.remote() for worker in workers]
        sending.send({name: weight + 3 for name, weight in Worker("ray:x").live.model.state_dict().items()}, version=3)
        assert node.get(taking) == [(3, 3.0, "")] * 2
        assert start_relays("ray:job") == {}
    assert whereabouts("ray:job") is None
    assert not left()


@pytest.mark.parametrize("how", ["made", "given", "insecure"])
def test_a_relay_is_led_to_the_sender_itself_with_keys(how, node, tmp_path, address):
    host = node.util.get_node_ip_address()
    options = {"insecure": True} if how == "insecure" else {}
    if how == "given":
        from hotweights.transfer.keys import make_keys

        make_keys(tmp_path / "keys", [host])
        options = {"keys": tmp_path / "keys"}
    live = hw.LiveModel(Tiny())
    with sender("ray:tls", **options) as sending, Relay("ray:tls", address) as relay, receiver(address) as source:
        running, worker = Thread(relay.run), Thread(lambda: live.load(source))
        report = sending.send(Tiny(1), version=1)
        worker.result()
        relay.close()
        running.result()
    assert value_of(live.model) == 1.0
    assert report.network_nbytes > 0
    assert f"on {host}" in report.committed[0]


def test_who_comes_past_ray_has_no_key(node):
    with sender("ray:closed", timeout=2.0) as sending:
        network = whereabouts("ray:closed").network
        with receiver(network, insecure=True) as stranger:
            other = Thread(lambda: hw.LiveModel(Tiny()).load(stranger))
            with pytest.raises(hw.TransferTimeout):
                sending.send(Tiny(1), version=1)
            stranger.close()
            with pytest.raises(hw.HotweightsError):
                other.result()


def test_the_environment_may_say_it(node, monkeypatch):
    monkeypatch.setenv("HOTWEIGHTS_ADDRESS", "ray:env")
    live = hw.LiveModel(Tiny())
    with sender("env:") as sending, receiver("env:") as source:
        worker = Thread(lambda: live.load(source))
        sending.send(Tiny(1), version=1)
        worker.result()
    assert value_of(live.model) == 1.0


def test_a_command_joins_the_cluster_on_its_host(node, tmp_path):
    hw.save(Tiny(7), tmp_path / "model.safetensors")
    live = hw.LiveModel(Tiny())
    with receiver("ray:cli", offer_timeout=100) as source:
        worker = Thread(lambda: live.load(source))
        command = [sys.executable, "-m", "hotweights", "send", str(tmp_path / "model.safetensors"), "--to", "ray:cli"]
        # Other clusters may be on this machine.
        environment = {**os.environ, "RAY_ADDRESS": node.get_runtime_context().gcs_address}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        worker.result()
    assert value_of(live.model) == 7.0
    assert "taken by process" in done.stdout


def test_who_resolves_takes_the_name(node):
    with Resolver("ray:doubt") as resolver:
        assert resolver.run(0.1) == []
        with pytest.raises(hw.AddressTaken):
            Resolver("ray:doubt")


def test_a_sender_that_is_not_there_is_waited_for_and_polled_without_waiting(node):
    with hw.Receiver("ray:nobody", offer_timeout=1.0) as source:
        began = time.monotonic()
        assert source.poll() is None
        assert time.monotonic() - began < 1.0
        with pytest.raises(hw.TransferTimeout, match="no offer came to ray:nobody"):
            _ = source.manifest
    assert whereabouts("ray:nobody") is None
    with pytest.raises(hw.TransferError, match="no sender is at ray:nobody"):
        start_relays("ray:nobody")
    with pytest.raises(hw.UsageError, match="keep="):
        start_relays("ray:nobody", keep="much")


def test_what_cannot_be(node, tmp_path):
    for wrong in ("ray:", "ray:a/b", "ray://host:10001"):
        with pytest.raises(hw.UsageError, match="an address in Ray is ray:NAME"):
            endpoint_of(wrong)
    with pytest.raises(hw.UsageError, match=r"hotweights keys .* --hosts HOST"):
        hw.Sender("ray:job", keys=tmp_path)
    from hotweights.transfer.keys import make_keys

    make_keys(tmp_path / "keys", ["elsewhere"])
    os.unlink(tmp_path / "keys" / "ca.key")
    with pytest.raises(hw.UsageError, match=r"has none for .* hotweights keys DIR --hosts"):
        hw.Sender("ray:job", keys=tmp_path / "keys")
    assert whereabouts("ray:job") is None


def test_keys_lie_on_no_disk(tmp_path):
    before = set(os.listdir("/dev/shm"))
    chest = KeyChest()
    keys = chest.keys_for("10.0.0.1")
    assert keys == chest.keys_for("10.0.0.1")
    assert keys.authority == chest.keys_for("10.0.0.2").authority
    assert "PRIVATE" not in repr(keys)
    assert keys.serving(())
    assert keys.connecting(())
    assert set(os.listdir("/dev/shm")) <= before
    with pytest.raises(hw.UsageError, match="cannot be read"):
        files_of(tmp_path / "nowhere")


@pytest.fixture
def address(tmp_path):
    """An address that nobody has."""
    return f"unix:{tmp_path / 'run' / 'socket'}"
