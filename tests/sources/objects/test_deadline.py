"""The deadline that the user sets: every function and every command that takes an address takes it."""

import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from web import status

import hotweights as hw
from hotweights.cli import app
from hotweights.testing import write_checkpoint

TENSORS = {"weight": torch.randn(30, 1000), "bias": torch.randn(30)}


@pytest.fixture
def bucket(bucket):
    """A container behind a proxy that the first failure has turned against everybody."""
    hw.save(TENSORS, "az://b/m")
    bucket.always = status(503)
    return bucket


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "az://b/m"],
        ["inspect", "az://b/m", "DIR"],
        ["verify", "az://b/m"],
        ["verify", "DIR", "az://b/m"],
        ["diff", "DIR", "az://b/m"],
        ["diff", "az://b/m", "DIR"],
        ["copy", "az://b/m", "NEW"],
        ["copy", "DIR", "az://b/new"],
        ["convert", "az://b/m", "NEW", "--dtype", "BF16"],
        ["follow", "az://b", "--versions", "1"],
        ["plan", "az://b/m", "--model", "torch.nn:Identity"],
        ["load", "az://b/m", "--model", "torch.nn:Identity"],
        ["send", "az://b/m", "--to", "unix:/run/nobody.sock"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_a_command_ends_after_it_and_says_how_to_wait_longer(bucket, tmp_path, command):
    write_checkpoint(tmp_path / "m", TENSORS)
    places = {"DIR": str(tmp_path / "m"), "NEW": str(tmp_path / "new")}
    done = CliRunner().invoke(app, [*(places.get(word, word) for word in command), "--deadline", "0.3"])
    assert done.exit_code == (2 if command[0] == "diff" else 1), done.output
    said = " ".join(done.output.split())
    assert "within 0.3 s; " in said
    assert "tries, the last answer: 503 Service Unavailable. --deadline SECONDS waits longer" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["send DIR --to az://b/run", "receive --from az://b/run --model DIR"])
def test_where_versions_are_published_it_is_the_timeout(bucket, tmp_path, command):
    write_checkpoint(tmp_path, TENSORS)
    BertConfig = pytest.importorskip("transformers").BertConfig
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, [*command.replace("DIR", str(tmp_path)).split(), "--timeout", "0.3"])
    assert done.exit_code == 1
    assert "503 Service Unavailable. --timeout SECONDS waits longer" in " ".join(done.output.split())


FUNCTIONS = {
    "open": lambda **options: hw.open("az://b/m", **options).close(),
    "save": lambda **options: hw.save(TENSORS, "az://b/new", **options),
    "follow": lambda **options: next(hw.follow("az://b", **options)),
    "a sender": lambda **options: hw.Sender("az://b/run", **options),
    "a receiver": lambda **options: hw.Receiver("az://b/run", **options).poll(),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_takes_it_as_an_option_of_the_store(bucket, function):
    with pytest.raises(hw.StoreError, match=r"within 0\.3 s; \d+ tries") as error:
        FUNCTIONS[function](store={"deadline": 0.3})
    assert re.search(r'store=\{"deadline": seconds\}\)? waits longer', str(error.value))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_takes_it_by_itself(bucket, function):
    named = "timeout" if function.startswith("a ") else "deadline"
    with pytest.raises(hw.StoreError, match=r"within 0\.3 s; \d+ tries") as error:
        FUNCTIONS[function](**{named: 0.3})
    assert function in ("open", "save") or f"{named}=seconds waits longer" in str(error.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_store_of_the_caller_has_it_too(bucket, function):
    from obstore.store import AzureStore

    named = "timeout" if function.startswith("a ") else "deadline"
    mine = AzureStore("b", retry_config={"max_retries": 0})
    with pytest.raises(hw.StoreError, match=r"within 0\.3 s; \d+ tries") as error:
        FUNCTIONS[function](store=mine, **{named: 0.3})
    assert f"{named}=seconds waits longer" in str(error.value)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: hw.open("az://b/m", deadline=0), "deadline= is more than 0 s; found 0"),
        (lambda: hw.open("az://b/m", deadline=1, store={"deadline": 2}), 'deadline= and store={"deadline"}: one of'),
        (lambda: hw.open("m", deadline=1), "deadline= is for addresses"),
        (lambda: hw.open(nn.Linear(1, 1), deadline=1), "deadline= is for addresses"),
        (lambda: hw.save(TENSORS, "m", deadline=1), "deadline= is for addresses"),
        (lambda: hw.save(TENSORS, "az://b/m", deadline="1"), "deadline= is more than 0 s; found '1'"),
        (lambda: hw.follow(".", deadline=1), "deadline= is for addresses"),
        (lambda: hw.follow("az://b", deadline=-1), "deadline= is more than 0 s; found -1"),
    ],
)
def test_what_makes_no_sense(ask, says):
    with pytest.raises(hw.UsageError) as error:
        ask()
    assert says in str(error.value)


@pytest.mark.parametrize("command", ["inspect DIR", "verify DIR DIR", "diff DIR DIR", "copy DIR NEW", "follow DIR"])
def test_a_command_without_an_address_refuses_it(tmp_path, command):
    write_checkpoint(tmp_path / "m", TENSORS)
    words = command.replace("DIR", str(tmp_path / "m")).replace("NEW", str(tmp_path / "new")).split()
    done = CliRunner().invoke(app, [*words, "--deadline", "3"])
    assert done.exit_code == 2
    assert "--deadline is for addresses, such as s3://bucket/model; leave it out" in done.output


def test_the_advice_of_a_load_can_be_followed(bucket):
    """A load has no option for it; what it says is typed here."""
    model = nn.Linear(1000, 30)
    bucket.always = None
    with hw.open("az://b/m", deadline=0.3) as source:
        bucket.always = status(503)
        with pytest.raises(hw.StoreError) as error:
            hw.load(model, source)
    bucket.always = None
    advice = re.search(r"hotweights\.open\(.*?\)(?= waits longer)", str(error.value))[0]
    with eval(advice, {"hotweights": hw, "address": "az://b/m", "seconds": 20}) as source:
        hw.load(model, source)
    assert torch.equal(model.weight, TENSORS["weight"])
