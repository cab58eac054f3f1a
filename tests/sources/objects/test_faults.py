"""Everything that a store may do wrong. What fails once is got by another try; what goes on failing is one error."""

import ast
import hashlib
import itertools
import os
import pickle
import re
import traceback
from importlib import import_module

import pytest
import torch
from torch import nn
from web import Web, cut, other_range, reset, shorter, stall, status

import hotweights as hw
from hotweights.sources.contracts import Read
from hotweights.testing import write_checkpoint

ONCE = {
    "503": status(503),
    "429": status(429),
    "500": status(500, b"<Error><Code>InternalError</Code></Error>"),
    "a brief 400": status(400, b"<Error><Code>RequestTimeout</Code></Error>"),
    "a reset": reset,
    "a body that is cut at its beginning": cut(0),
    "a body that is cut": cut(0.7),
    "a body that stalls": stall(0.7),
    "no answer": stall(0),
    "another range": other_range,
    "a shorter body": shorter,
    "a refusal of credentials that were good": status(403),
    "expired credentials": status(400, b"<Error><Code>ExpiredToken</Code></Error>"),
}
TENSOR = torch.arange(1_000_000, dtype=torch.int32)


@pytest.fixture
def checkpoint(tmp_path):
    with hw.open({"a": TENSOR}) as source:
        hw.save(source, tmp_path / "model.safetensors")
    return tmp_path


def read(source):
    into = torch.zeros_like(TENSOR)
    with hw.Pool() as pool:
        source.read([Read("a", 0, into.nbytes, into)], pool=pool)
    return into


@pytest.mark.parametrize("fault", ONCE)
def test_what_fails_once_is_got_by_another_try(serve, checkpoint, fault):
    proxy = serve(checkpoint)
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": 4}) as source:
        before = len(proxy.ranges)
        proxy.faults.append(ONCE[fault])
        assert torch.equal(read(source), TENSOR)
        assert len(proxy.ranges) - before == 2
        assert not proxy.faults


@pytest.mark.parametrize("fault", ["503", "a reset", "a body that is cut", "no answer", "a shorter body"])
def test_what_fails_once_while_it_is_opened_is_got_by_another_try(serve, checkpoint, fault):
    proxy = serve(checkpoint)
    proxy.faults.append(ONCE[fault])
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": 4}) as source:
        assert torch.equal(read(source), TENSOR)


def test_a_second_try_goes_on_where_the_first_ended(serve, checkpoint):
    proxy = serve(checkpoint)
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": 4}) as source:
        proxy.faults.append(cut(0.9))
        read(source)
    (first, _), (again, _) = (map(int, re.findall(r"\d+", span)) for span in proxy.ranges[-2:])
    assert again - first >= 2 * 1024 * 1024


def hurried(monkeypatch, step):
    """A clock that goes on by so much with each look at it: what is late does not depend on the machine."""
    clock = itertools.count(0, step)
    monkeypatch.setattr(import_module("hotweights.sources.objects.store"), "_now", lambda: next(clock))
    return clock


def test_a_body_that_comes_bit_by_bit_gets_the_deadline_anew_with_each(serve, checkpoint, monkeypatch):
    """All tries together take more than the deadline."""
    proxy = serve(checkpoint)
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": 100}) as source:
        clock = hurried(monkeypatch, 15)
        proxy.faults.extend([cut(0.5), status(503), cut(0.5), cut(0.7)])
        assert torch.equal(read(source), TENSOR)
        assert not proxy.faults
    assert next(clock) > 200


LASTING = {
    "503": (status(503), "503 Service Unavailable"),
    "429": (status(429), "429 Too Many Requests"),
    "slow down": (status(503, b"<Error><Code>SlowDown</Code></Error>"), "503 Service Unavailable SlowDown"),
    "a reset": (reset, "the connection was lost"),
    "a body that is cut": (cut(0), "the body ended before its end"),
    "no answer": (stall(0), "nothing came"),
    "another range": (other_range, "another range than was asked for"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_goes_on_failing_is_one_error_after_the_deadline(serve, checkpoint, fault, monkeypatch):
    proxy = serve(checkpoint)
    deadline = 3 if fault == "no answer" else 100
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": deadline}) as source:
        proxy.always, says = LASTING[fault]
        if deadline > 3:
            hurried(monkeypatch, 20)
        with pytest.raises(hw.StoreError) as error:
            read(source)
    text = str(error.value)
    says = rf"{deadline} s; \d+ tries, the last answer: {says}\. "
    assert re.search(rf"m/model.safetensors bytes 65536\.\.\d+: not to be had within {says}", text)
    assert 'store={"deadline": seconds}' in text
    assert int(re.search(r"(\d+) tries", text)[1]) > 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (status(404), "went away while it was open"),
        (status(412), "was replaced after it was opened"),
    ],
)
def test_an_object_that_is_not_there_any_more_is_said_at_once(serve, checkpoint, fault, says):
    proxy = serve(checkpoint)
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": 30}) as source:
        proxy.faults.append(fault)
        with pytest.raises(hw.CheckpointChanged, match=says):
            read(source)


@pytest.mark.parametrize("tags", ["strong", "weak", None])
def test_an_object_that_is_replaced_is_never_mixed_with_the_one_that_was_opened(serve, checkpoint, tags):
    proxy = serve(checkpoint, tags=tags)
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": 30}) as source:
        old = proxy.web.files["m/model.safetensors"]
        proxy.web.files["m/model.safetensors"] = old[:-1] + b"!" if tags else old + b"!"
        with pytest.raises(hw.CheckpointChanged, match="was replaced after it was opened"):
            read(source)


def test_a_load_leaves_the_live_model_as_it_was_when_the_object_is_replaced(serve, tmp_path):
    write_checkpoint(tmp_path, {"weight": torch.randn(200, 200), "bias": torch.randn(200)})
    proxy = serve(tmp_path)
    live = hw.LiveModel(nn.Linear(200, 200))
    live.load(tmp_path)
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    with hw.open(f"{proxy.url}/m/model.safetensors") as source:
        proxy.web.files["m/model.safetensors"] += b"!"
        with pytest.raises(hw.UpdateAborted, match="was replaced after it was opened"):
            live.update(source)
    assert all(torch.equal(live.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_index_that_is_replaced_while_objects_are_read_is_noticed(serve, tmp_path):
    proxy = serve(write_checkpoint(tmp_path, {"a": torch.arange(9), "b": torch.arange(5)}, shards=2))
    with hw.open(f"{proxy.url}/m") as source:
        proxy.web.files["m/model.safetensors.index.json"] += b" "
        with pytest.raises(hw.CheckpointChanged, match=r"index.json: the object was replaced"):
            source.check()
        del proxy.web.files["m/model.safetensors.index.json"]
        with pytest.raises(hw.CheckpointChanged, match="went away"):
            source.check()


def test_credentials_that_expire_for_good_are_said(serve, checkpoint):
    proxy = serve(checkpoint)
    with hw.open(f"{proxy.url}/m/model.safetensors", store={"deadline": 30}) as source:
        before = len(proxy.ranges)
        proxy.always = status(403)
        with pytest.raises(
            hw.StoreError, match=r"bytes 65536\.\.\d+: .*refused the credentials.*403 Forbidden \(3 tries\); they have"
        ):
            read(source)
        assert len(proxy.ranges) - before == 3


def test_credentials_that_never_were_good_are_refused_at_once_and_the_advice_works(checkpoint):
    content = (checkpoint / "model.safetensors").read_bytes()
    with Web({"m/model.safetensors": content}, needs="Bearer TOKEN") as web:
        address = f"{web.url}/m/model.safetensors"
        with pytest.raises(hw.StoreError, match="refused the credentials, or asks for some: 401") as error:
            hw.open(address, store={"deadline": 30})
        advised = ast.literal_eval(str(error.value).partition("store=")[2])
        hw.open(address, store=advised).close()


def test_a_server_that_ignores_ranges_is_found_out_when_it_is_opened(checkpoint):
    refused = pytest.raises(hw.StoreError, match=r"all of the object instead of a range.*download it")
    content = (checkpoint / "model.safetensors").read_bytes()
    with Web({"m/model.safetensors": content}, ranges=False) as web, refused:
        hw.open(f"{web.url}/m/model.safetensors", store={"deadline": 30})


SECRET = "hush5ecret"


def test_no_secret_is_in_an_error_a_log_or_a_name(serve, checkpoint, caplog, recwarn, monkeypatch):
    """Also where the package quotes the address, and in what a traceback would show."""
    proxy = serve(checkpoint)
    host = proxy.url.removeprefix("http://")
    address = f"http://user:{SECRET}@{host}/m/model.safetensors"
    errors = []
    with hw.open(address, store={"deadline": 100, "default_headers": {"x-token": SECRET}}) as source:
        hurried(monkeypatch, 20)
        assert SECRET not in repr(source) + str(source.files) + source.path
        for fault in (reset, status(403, SECRET.encode()), status(500, SECRET.encode()), status(404, SECRET.encode())):
            proxy.always = fault
            with pytest.raises(hw.CheckpointError) as error:
                read(source)
            errors.append(error.value)
    for store in ({"region": SECRET}, {"timeout": SECRET}):
        with pytest.raises(hw.UsageError) as error:
            hw.open(address, store=store)
        errors.append(error.value)
    for error in errors:
        assert SECRET not in "".join(traceback.format_exception(error))
        while error is not None:
            assert SECRET not in str(error)
            error = error.__cause__
    assert SECRET not in caplog.text
    assert not recwarn.list


def test_a_source_that_is_forgotten_is_closed_and_said(serve, checkpoint):
    source = hw.open(serve(checkpoint).url + "/m/model.safetensors")
    box = [source]
    del source
    with pytest.warns(ResourceWarning, match="was not closed"):
        box.clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told_what_to_do(serve, checkpoint):
    with hw.open(serve(checkpoint).url + "/m/model.safetensors") as source:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            says = []
            for ask in (source.check, lambda: dict(source.tensors()), lambda: hw.open(source.files[0])):
                try:
                    ask()
                except BaseException as error:
                    says.append(str(error))
            os.write(theirs, pickle.dumps(says))
            os._exit(0)
        os.close(theirs)
        says = pickle.loads(os.read(ours, 10_000))
        assert len(says) == 2  # ``check`` asks nobody.
        assert all('multiprocessing.get_context("spawn")' in text for text in says)
        os.close(ours)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("address", "options", "says"),
    [
        ("http://h/m", {"deadline": 0}, r'store=\{"deadline"\}= is more than 0 s; found 0'),
        ("http://h/m", {"requests": 1.5}, r'store=\{"requests"\}= is a whole number of at least 1'),
        ("http://h/m", {"region": "x"}, "options that the web does not know: region"),
        ("http://h/m?token=1", {}, "question mark"),
        ("s3://b/m", {"nonsense": 1}, "there is no option 'nonsense'"),
        ("s3://b/m", "eu", "store= is a mapping of options"),
        ("ftp://h/m", None, "addresses begin with s3://"),
        ("model", {"deadline": 1}, "store= is for addresses"),
        ({"a": torch.zeros(1)}, {"deadline": 1}, "store= is for addresses"),
        (["http://h/a.safetensors", "http://i/b.safetensors"], None, "of one store"),
        (["http://h/a.safetensors", "b.safetensors"], None, "of one store"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_asked(address, options, says):
    with pytest.raises(hw.UsageError, match=says):
        hw.open(address, store=options)


def test_readers_of_other_packages_read_files_only():
    with pytest.raises(
        hw.UsageError, match="the reader 'safetensors' reads files, no stores; leave reader= out for http://h/"
    ):
        hw.open("http://h/m", reader="safetensors")


def test_bytes_are_those_of_the_object(serve, checkpoint):
    """Against what the server holds, by a digest of another library."""
    with hw.open(serve(checkpoint).url + "/m/model.safetensors") as source:
        assert hashlib.sha256(read(source).numpy()).digest() == hashlib.sha256(TENSOR.numpy()).digest()
