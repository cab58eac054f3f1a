"""No secret is in an error, a log, a warning or a name: wherever it was said, and whatever the store does then."""

import itertools
import logging
import re
import traceback
from importlib import import_module

import pytest
import torch
from clouds import Azure
from web import Bucket, HubServer, Proxy, Web, cut, other_range, reset, shorter, status

import hotweights as hw
from hotweights.testing import write_checkpoint

SECRET = "hush5ecret"
BODY = f"<Error><Code>AccessDenied</Code><Message>{SECRET}</Message></Error>".encode()
FAULTS = {
    **{str(code): status(code, BODY) for code in (301, 307, 400, 401, 403, 404, 409, 412, 416, 429, 500, 503)},
    "expired": status(400, f"<Error><Code>ExpiredToken</Code><Token>{SECRET}</Token></Error>".encode()),
    "a redirect": lambda handler, code, headers, body: (302, {"Location": f"http://127.0.0.1:1/?sig={SECRET}"}, b""),
    "no store": lambda handler, *answer: (200, {"ETag": SECRET}, BODY),
    "a reset": reset,
    "cut": cut(0),
    "another range": other_range,
    "shorter": shorter,
}


def of_web(start, monkeypatch):
    """In the address, and in a header."""
    proxy = start(Web, "m/")
    address = f"http://user:{SECRET}@{proxy.url.removeprefix('http://')}/m"
    return proxy, address, {"default_headers": {"x-token": SECRET}}


def of_s3(start, monkeypatch):
    """In ``store=``."""
    proxy = start(Bucket, "m/")
    keys = {"access_key_id": f"id{SECRET}", "secret_access_key": SECRET, "session_token": SECRET}
    return proxy, "s3://b/m", {"endpoint": proxy.url, "region": "us-east-1", **keys}


def of_s3_by_variables(start, monkeypatch):
    proxy = start(Bucket, "m/")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", SECRET)
    return proxy, "s3://b/m", {"endpoint": proxy.url, "region": "us-east-1"}


def of_azure(start, monkeypatch):
    """In the query of each request: a signature, as of addresses that were signed before."""
    proxy = start(Azure, "m/")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"se=2030-01-01&sig={SECRET}")
    return proxy, "az://b/m", {"account_name": "account", "endpoint": f"{proxy.url}/account"}


def of_hub(start, monkeypatch):
    """In a header, and in the address to which the hub leads."""
    hub = start(HubServer, "", proxied=False)
    hub.cdn.url = (proxy := start(None, hub.cdn.url)).url
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("web.SIGNATURE", SECRET)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return proxy, "hf://org/name", {}


@pytest.fixture
def start(tmp_path):
    """Starts a server of one checkpoint, and the proxy before it."""
    running = []
    folder = write_checkpoint(tmp_path / "made", {"a": torch.arange(50_000)})

    def begin(kind, where, *, proxied=True):
        if kind is not None:
            running.append(kind({f"{where}{path.name}": path.read_bytes() for path in folder.iterdir()}))
            where = running[-1].url
        if proxied:
            running.append(Proxy(where))
        return running[-1]

    yield begin
    for server in reversed(running):
        server.__exit__()


@pytest.mark.parametrize("place", [of_web, of_s3, of_s3_by_variables, of_azure, of_hub], ids=lambda make: make.__name__)
def test_no_fault_tells_a_secret(place, start, monkeypatch, caplog, recwarn):
    caplog.set_level(logging.DEBUG)
    proxy, address, options = place(start, monkeypatch)
    errors = []

    def fails(do):
        with pytest.raises(hw.HotweightsError) as error:
            do()
        errors.append(error.value)

    clock = itertools.count(0, 30)
    monkeypatch.setattr(import_module("hotweights.sources.objects.tries"), "_now", lambda: next(clock))
    store = {**options, "deadline": 100}
    with hw.open(address, store=store) as source:
        told = [repr(source), source.path, *source.files, repr(source._store)]
        for fault in FAULTS.values():
            proxy.always = fault
            fails(lambda: dict(source.tensors()))
    for fault in FAULTS.values():
        proxy.always = fault
        fails(lambda: hw.open(address, store=store))
    if not address.startswith(("http", "hf")):
        monkeypatch.setattr("hotweights.sources.objects.client._RETRIES", 0)
        for fault in ("403", "404", "500", "a reset"):
            proxy.always = FAULTS[fault]
            fails(lambda: hw.save({"a": torch.arange(9)}, f"{address}/new", store=store))
            fails(lambda: hw.Sender(address, store=store))
    proxy.__exit__()
    fails(lambda: hw.open(address, store=store))
    for error in errors:
        told += traceback.format_exception(error)
        while error is not None:
            told += [str(error), repr(error), *map(str, getattr(error, "problems", ()))]
            error = error.__cause__ or error.__context__
    told += [caplog.text, *(str(warning.message) for warning in recwarn.list)]
    assert [line for line in told if SECRET in line] == []


@pytest.mark.parametrize(
    ("address", "options"),
    [
        (f"https://h/m.safetensors?sig={SECRET}", {}),
        (f"https://h/m.safetensors?X-Amz-Signature={SECRET}&x=1#f", {}),
        (f"https://user:{SECRET}@h/m.safetensors?sig=1", {}),
        ("s3://b/m", {"region": SECRET, "nonsense": SECRET}),
        ("s3://b/m", {"timeout": SECRET, "secret_access_key": SECRET}),
        ("az://b/m", {"account_name": "a", "account_key": f"{SECRET}!"}),
        ("gs://b/m", {"service_account_key": f'{{"private_key": "{SECRET}"'}),
        (f"ftp://user:{SECRET}@h/m", {}),
        (f"ftp://h/m?sig={SECRET}", {}),
        ([f"http://user:{SECRET}@h/a.safetensors", "http://i/b.safetensors"], {}),
        (f"http://user:{SECRET}@h/m", {"nonsense": SECRET}),
        ("hf://org/name", {"token": SECRET, "nonsense": SECRET}),
    ],
)
def test_what_is_refused_before_anything_is_asked_tells_no_secret(address, options, caplog):
    with pytest.raises(hw.UsageError) as error:
        hw.open(address, store=options or None)
    assert SECRET not in "".join(traceback.format_exception(error.value))
    assert SECRET not in caplog.text
    assert re.search(r"\w", str(error.value))
