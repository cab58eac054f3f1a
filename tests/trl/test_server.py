"""Trainers of TRL that give versions to a server of vLLM: tokens are those of fresh engines, whoever fails or dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile

import asynchronous
import pytest
from serving import Server
from trained import by_client, fresh, life

KILLED = ("between tensors", "at Offer", "at Filled", "at Commit", "before finish_weight_update")
"""Where a trainer is killed: while it reads its tensors, when it would send a message, or before a call."""


@pytest.fixture(scope="module")
def server(zoo, tmp_path_factory):
    server = Server(zoo.checkpoint("llama", "A"), tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def lived(zoo, server, folder, kind, adapter=False):
    settings = {"vllm_mode": "server", "vllm_server_base_url": server.url}
    return zoo.run(life, None, kind, str(zoo.checkpoint("llama", "A")), str(folder), adapter, settings)


def compare(zoo, found, versions):
    """Each version says what a fresh engine says of what was saved then."""
    for version, said, path in found:
        if version in versions:
            assert said == fresh(zoo, path), f"version {version}"
    assert len({tuple(said) for _, said, _ in found}) > 1, "all versions say the same, so this shows nothing"


def test_three_steps(zoo, server, tmp_path):
    found = lived(zoo, server, tmp_path, "GRPO")
    assert [version for version, _, _ in found] == [1, 2, 3]
    compare(zoo, found, (1, 2, 3))
    assert server.status()["version"] == 3


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "adapter"), [("GRPO", True), ("RLOO", False), ("OnlineDPO", False), ("OnlineDPO", True)]
)
def test_kin_and_adapters(zoo, server, tmp_path, kind, adapter):
    found = lived(zoo, server, tmp_path, kind, adapter)
    assert [version for version, _, _ in found] == [1, 2, 3]
    compare(zoo, found, (3,))


@pytest.mark.long
@pytest.mark.parametrize("adapter", [False, True])
def test_an_asynchronous_trainer(zoo, server, tmp_path, adapter):
    """Weights that it does not train are sent too; and a server that took nothing serves on."""
    found = zoo.run(asynchronous.life, None, str(zoo.checkpoint("llama", "B")), str(tmp_path), server.url, adapter)
    assert found[:1] + found[2:] == [1, 3]
    assert found[1] == "OSError: the gather failed"
    assert server.say() == fresh(zoo, str(tmp_path / "end")) != zoo.fresh("llama", "B")[1]


@pytest.mark.long
def test_an_asynchronous_trainer_of_experts(zoo, tmp_path):
    """They lie in one tensor in memory; and the bias of the router is a buffer, which TRL leaves out."""
    server = Server(zoo.checkpoint("deepseek-v3", "A"), tmp_path / "log")
    try:
        server.wait_until_ready()
        zoo.run(asynchronous.life, None, str(zoo.checkpoint("deepseek-v3", "B")), str(tmp_path), server.url, False)
        said = server.say()
    finally:
        server.close()
    # Of this model a server says something else than an engine in the process that asks it.
    other = Server(tmp_path / "end", tmp_path / "other-log", ours=("--attention-backend", "CPU_MLA"))
    try:
        other.wait_until_ready()
        assert other.say() == said
    finally:
        other.close()


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["none", "fsdp1", "fsdp2"])
def test_several_processes(zoo, server, tmp_path, sharding):
    """Each holds all of the model, or a part of each tensor; the first sends. A refused version leaves none waiting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=1"]
    command += [
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        os.path.join(os.path.dirname(__file__), "several.py"),
    ]
    given = [str(zoo.checkpoint("llama", "B")), server.url, sharding, str(tmp_path)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "0.json").read_text())
    assert found["synced"] == found["refused"] == zoo.fresh("llama", "B")[1]
    assert found["raised"].startswith("TransferAborted: ")
    assert "v_proj" in found["raised"]
    assert found["trained"] == fresh(zoo, str(tmp_path / "end")) != found["synced"]


def connected(url, afar=False):
    """TRL's client, as its trainers make it; ``afar`` as where the server is on another host."""
    from trl.generation.vllm_client import VLLMClient

    import hotweights.engines.trl
    from hotweights.transfer.keys import make_keys

    there = {}
    if afar:
        there = {"address": "tcps://127.0.0.1:0", "keys": tempfile.mkdtemp(prefix="hotweights-keys-")}
        make_keys(there["keys"], ["127.0.0.1"])
    hotweights.engines.trl.enable(timeout=60, **there)
    client = VLLMClient(base_url=url)
    client.init_communicator(device="cpu")
    return client


def loaded(path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path)


def outcome(act):
    """What it raised, in words."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def told(model):
    """As TRL tells what comes."""
    return [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in model.named_parameters()
    ]


def faults(url, paths):
    """What fails, what is raised, and what the server says then; after each a whole version is taken."""
    client, models = connected(url, afar=True), {weights: loaded(path) for weights, path in paths.items()}
    client.update_model_params(models["A"])
    pairs = {weights: list(model.named_parameters()) for weights, model in models.items()}
    ended = []

    def failing(known):
        for number, pair in enumerate(pairs["B"]):
            if number == known:
                raise RuntimeError("the gather failed")
            yield pair
        ended.append("read to the end")

    def one_by_one(weights, number=None):
        with client.weight_update():
            for name, tensor in pairs[weights][:number]:
                client.update_named_param(name, tensor.data)
            if number is not None:
                raise RuntimeError("the trainer failed")

    found = {}
    for name, act in {
        "missing": lambda: client.update_named_params(told(models["B"])[:-1], failing(None)),
        "shape": lambda: client.update_named_params(
            [(name, dtype, [7, 3] if name == "lm_head.weight" else shape) for name, dtype, shape in told(models["B"])],
            failing(None),
        ),
        "raises": lambda: client.update_named_params(told(models["B"]), failing(4)),
        "one alone": lambda: client.update_named_param(*pairs["B"][0]),
        "leaves a group": lambda: one_by_one("B", 5),
        "one by one": lambda: one_by_one("B"),
    }.items():
        found[name] = outcome(act), by_client(client)
    client.update_model_params(models["A"])
    found["last"] = None, by_client(client)
    client.close_communicator()
    client.close_communicator()
    found["closed"] = outcome(lambda: client.update_model_params(models["A"])), by_client(client)
    return found, ended


def test_what_fails_is_raised_and_changes_nothing(zoo, server):
    said = {weights: zoo.fresh("llama", weights)[1] for weights in "AB"}
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    found, ended = zoo.run(faults, None, server.url, paths)
    for name, words in {
        "missing": "TransferAborted: .*lm_head.weight: missing",
        "shape": "TransferAborted: .*Error",
        "raises": "RuntimeError: the gather failed|SourceError: .*the gather failed",
        "one alone": "TransferAborted: .*missing",
        "leaves a group": "RuntimeError: the trainer failed",
        "closed": "UsageError: .*init_communicator",
    }.items():
        assert re.match(words, found[name][0] or "", re.DOTALL), (name, found[name])
        assert found[name][1] == said["A"], name
    assert found["one by one"] == (None, said["B"])
    assert found["last"] == (None, said["A"])
    assert len(ended) == 2, "TRL unmerges adapters at the end of the walk"


def whole(url, path):
    """A trainer's whole life."""
    client = connected(url)
    client.update_model_params(loaded(path))
    client.close_communicator()


def doomed(url, path, where, afar):
    """A trainer that is killed at a certain point of its life."""
    from hotweights.engines.vllm.clients import HTTPClient
    from hotweights.transfer.channel import Channel

    called, send = HTTPClient._called, Channel.send

    def kill(here):
        if here == where:
            os.kill(os.getpid(), signal.SIGKILL)

    def calling(self, method, path, given=None):
        kill(f"before {path}")
        return called(self, method, path, given)

    def sending(self, message, **more):
        kill(f"at {type(message).__name__}")
        return send(self, message, **more)

    HTTPClient._called, Channel.send = calling, sending
    client, model = connected(url, afar), loaded(path)

    def pairs():
        for number, (name, tensor) in enumerate(model.named_parameters()):
            if number == 9:
                kill("between tensors")
            yield name, tensor.data

    client.update_named_params(told(model), pairs())


def test_a_killed_trainer_leaves_a_whole_version_and_the_next_is_served(zoo, server):
    said = {weights: zoo.fresh("llama", weights)[1] for weights in "AB"}
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    zoo.run(whole, None, server.url, paths["A"])
    assert server.say() == said["A"]
    live, other = "A", "B"
    # Killed when it would send Commit, it has decided so. One host has that in shared memory; others are in doubt.
    for where, afar, state, taken in [
        *((where, False, "serving", number >= KILLED.index("at Commit")) for number, where in enumerate(KILLED)),
        ("at Commit", True, "in doubt", False),
        ("before finish_weight_update", True, "serving", True),
    ]:
        with pytest.raises((AssertionError, EOFError)):
            zoo.run(doomed, None, server.url, paths[other], where, afar)
        assert server.status()["state"] == state, (where, afar)
        if taken:
            live, other = other, live
        for call in ("reset_prefix_cache?reset_running_requests=true", "wake_up?tags=scheduling"):
            server.called(call)  # By hand, what the next trainer does too.
        assert server.say() == said[live], (where, afar)
        zoo.run(whole, None, server.url, paths[other])
        live, other = other, live
        assert server.say() == said[live], (where, afar)
        status = server.status()
        assert (status["state"], status["session_open"]) == ("serving", False)


def refused(url):
    return outcome(lambda: connected(url))


@pytest.mark.long
def test_a_server_of_another_backend_is_refused_with_what_to_type(zoo, tmp_path):
    server = Server(zoo.checkpoint("llama", "A"), tmp_path / "log", ours=())
    try:
        server.wait_until_ready()
        words = zoo.run(refused, None, server.url)
        assert words.startswith("UsageError: the vLLM server at http://127.0.0.1")
        assert '--load-format hotweights --weight-transfer-config \'{"backend": "hotweights"}\'' in words
    finally:
        server.close()
