"""Google's and Azure's stores, by servers that speak as they do; and by Azurite, Azure's own emulator, where it is."""

import base64
import contextlib
import hashlib
import hmac
import json
import re
import shutil
import subprocess
import urllib.request
from datetime import UTC, datetime
from urllib.parse import unquote

import pytest
import torch
from clouds import Azure, Google
from torch import nn

import hotweights as hw
from hotweights.testing.checks import assert_same_bits

TENSORS = {"weight": torch.randn(200, 300), "bias": torch.randn(200), "half": torch.randn(70_000).to(torch.bfloat16)}
NEW = {name: tensor + 1 for name, tensor in TENSORS.items()}
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # Azurite's, public


@contextlib.contextmanager
def google():
    with Google() as server:
        yield "gs://b", server.options


@contextlib.contextmanager
def azure():
    with Azure() as server:
        yield "az://b", server.options


@contextlib.contextmanager
def azurite():
    """``npm install -g azurite``."""
    program = shutil.which("azurite-blob") or pytest.skip("needs azurite: npm install -g azurite")
    command = [program, "--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--disableTelemetry"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = (re.search(r"listens on (http://127\.0\.0\.1:\d+)", line) for line in process.stdout)
            url = f"{next(match for match in found if match)[1]}/devstoreaccount1"
            make_container(url)
            yield "az://bucket", {"account_name": "devstoreaccount1", "account_key": KEY, "endpoint": url}
        finally:
            process.terminate()


def make_container(url):
    now = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": now, "x-ms-version": "2023-11-03"}
    told = "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed = f"PUT{chr(10) * 12}{told}/devstoreaccount1/devstoreaccount1/bucket\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()).decode()
    headers |= {"Authorization": f"SharedKey devstoreaccount1:{signature}", "Content-Length": "0"}
    request = urllib.request.Request(f"{url}/bucket?restype=container", headers=headers, method="PUT")
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture(params=[google, azure, pytest.param(azurite, marks=pytest.mark.long)], ids=lambda make: make.__name__)
def cloud(request):
    with request.param() as (address, options):
        yield address, {**options, "deadline": 60}


def read(address, options):
    with hw.open(address, store=options) as source:
        source.check()
        return dict(source.tensors())


def test_a_checkpoint_is_saved_opened_and_replaced(cloud):
    bucket, options = cloud
    hw.save(TENSORS, f"{bucket}/a run", store=options, shard_size=200_000)
    assert_same_bits(read(f"{bucket}/a run", options), TENSORS)
    with hw.open(f"{bucket}/a run", store=options) as old:
        hw.save(NEW, f"{bucket}/a run", store=options, shard_size=200_000)
        assert_same_bits(read(f"{bucket}/a run", options), NEW)
        with pytest.raises(hw.CheckpointChanged):
            old.check()
    hw.save(NEW, f"{bucket}/one.safetensors", store=options)
    assert_same_bits(read(f"{bucket}/one.safetensors", options), NEW)
    with pytest.raises(hw.CheckpointError, match="it is empty"):
        hw.open(f"{bucket}/nothing", store=options)
    with pytest.raises(hw.CheckpointError, match=r"nothing/m.safetensors: there is no such"):
        hw.open(f"{bucket}/nothing/m.safetensors", store=options)


def test_versions_go_from_a_trainer_to_a_worker_and_a_second_trainer_is_told(cloud):
    bucket, options = cloud
    address, live = f"{bucket}/run", hw.LiveModel(nn.Linear(30, 20))
    live.load(nn.Linear(30, 20))
    with (
        hw.Sender(address, keep=1, store=options) as first,
        hw.Receiver(address, interval=0.01, store=options) as receiver,
    ):
        for step in range(2):
            model = nn.Linear(30, 20)
            first.send(model, version=step)
            live.update(receiver)
            assert live.version == step
            assert torch.equal(live.model.weight, model.weight)
        with hw.Sender(address, store=options) as second:
            with pytest.raises(hw.AddressTaken):
                first.send(model, version=2)
            second.send(model, version=3)
    with hw.follow(address, timeout=5, latest=True, store=options) as versions:
        assert next(versions).name == "3"


@pytest.mark.parametrize("kind", [Google, Azure])
def test_an_object_that_is_replaced_while_it_is_read(kind):
    with kind() as server:
        address, options = f"{'gs' if kind is Google else 'az'}://b/m.safetensors", server.options
        hw.save(TENSORS, address, store=options)
        with hw.open(address, store=options) as source:
            server.write("m.safetensors", server.files["m.safetensors"][:-1] + b"!")
            with pytest.raises(hw.CheckpointChanged, match="was replaced after it was opened"):
                dict(source.tensors())


def test_google_by_its_usual_variables(tmp_path, monkeypatch):
    """A service account signs, and the server sees that on each request."""
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with Google(needs="Bearer ey") as server:
        account = {"type": "service_account", "client_email": "a@b", "private_key_id": "1", "gcs_base_url": server.url}
        (tmp_path / "account.json").write_text(json.dumps({**account, "private_key": key.decode()}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        options = {"allow_http": True}
        hw.save(TENSORS, "gs://b/m", store=options)
        assert_same_bits(read("gs://b/m", options), TENSORS)
        assert {unquote(path) for method, path, *_ in server.asked if method == "PUT"} == {"/b/m/model.safetensors"}
        monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT")
        with pytest.raises(hw.StoreError, match=r"refused the credentials.*; set GOOGLE_SERVICE_ACCOUNT or"):
            hw.open("gs://b/m", store=server.options)


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({"ACCOUNT_KEY": base64.b64encode(b"k" * 64).decode()}, "SharedKey account:"),
        ({"SAS_TOKEN": "sig=hush&se=2030-01-01"}, ""),
    ],
)
def test_azure_by_its_usual_variables(monkeypatch, variables, begins):
    with Azure(needs=begins) as server:
        for name, value in {"ACCOUNT_NAME": "account", "ENDPOINT": f"{server.url}/account", **variables}.items():
            monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
        options = {"allow_http": True}
        for address in ("az://b/m", "abfs://b/m"):
            hw.save(TENSORS, address, store=options)
            assert_same_bits(read(address, options), TENSORS)
        assert all(begins or query["sig"] == "hush" for _, _, query, _ in server.asked)
        if begins:
            with pytest.raises(
                hw.StoreError, match=r"refused the credentials.*; set AZURE_STORAGE_ACCOUNT_KEY"
            ) as error:
                hw.open("az://b/m", store={**server.options, "account_key": ""})
            assert variables["ACCOUNT_KEY"] not in str(error.value)
