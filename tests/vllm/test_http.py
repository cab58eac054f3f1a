"""Two servers of vLLM that one trainer gives versions to, over HTTP; trainers are killed at each step of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from drive import OPTIONS, PROMPTS
from trainers import caught, trained, trainer_of

KILLED = (
    *("before pause", "before start_weight_update", "after start_weight_update"),
    *("at Offer", "at Filled", "at End", "at Commit", "after update_weights"),
    *("before finish_weight_update", "after finish_weight_update", "before wake_up"),
)
"""Where a trainer is killed: before or after a call of the second server, or when it would send a message."""


class Server:
    """A server in processes of its own."""

    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = {key: key.replace("_", "-") for key in OPTIONS}
        flags = [f"--{names[key]}" + ("" if value is True else f"={value}") for key, value in OPTIONS.items()]
        flags += ["--load-format", "hotweights", "--worker-extension-cls", "hotweights.engines.vllm.Worker"]
        flags += ["--weight-transfer-config", '{"backend": "hotweights"}', "--host", "127.0.0.1", "--port", str(port)]
        self.url, self.log, self._model = f"http://127.0.0.1:{port}", log, str(model)
        # The engine in a process of its own, as users have it.
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self._model, *flags],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_until_ready(self):
        while self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text(errors="replace")[-5000:])

    def called(self, path, given=None):
        body = None if given is None else json.dumps(given).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def say(self):
        question = {"model": self._model, "prompt": PROMPTS[1], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        answer = self.called("v1/completions", {**question, "detokenize": False, "return_token_ids": True})
        return answer["choices"][0]["token_ids"]

    def status(self):
        (status,) = self.called("collective_rpc", {"method": "hotweights_status", "args": [False]})["results"]
        return status

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def clients_of(urls):
    from hotweights.engines.vllm import Clients, HTTPClient

    return Clients(*map(HTTPClient, urls))


def refitted(urls, path, version):
    """A trainer's whole life."""
    trainer = trainer_of(clients_of(urls), trained(path), timeout=60)
    report = trainer.send_weights(version)
    trainer.shutdown()
    return len(report.committed)


def doomed(urls, path, where):
    """A trainer that is killed at a certain point of its life."""
    from hotweights.engines.vllm.clients import HTTPClient
    from hotweights.transfer.channel import Channel

    when, what = where.split()
    called, send = HTTPClient._called, Channel.send

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def calling(self, method, path, given=None):
        here = path.split("?")[0] == what and self.url == urls[-1]
        if here and when == "before":
            kill()
        answer = called(self, method, path, given)
        if here and when == "after":
            kill()
        return answer

    def sending(self, message, **more):
        if when == "at" and type(message).__name__ == what:
            kill()
        return send(self, message, **more)

    HTTPClient._called, Channel.send = calling, sending
    refitted(urls, path, where)


def lost(urls, path, pid):
    """A trainer of whose two engines one is killed, while tensors travel."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    class Deadly(ModuleSource):
        def __iter__(self):
            for number, pair in enumerate(super().__iter__()):
                if number == 10:
                    os.killpg(pid, signal.SIGKILL)
                yield pair

    trainer = trainer_of(clients_of(urls), Deadly(trained(path)), timeout=60)
    failure = caught(lambda: trainer.send_weights("never"))
    trainer.shutdown()
    return failure


@pytest.fixture
def servers(zoo, tmp_path):
    pair = [Server(zoo.checkpoint("llama", "A"), tmp_path / f"{number}.log") for number in range(2)]
    try:
        for server in pair:
            server.wait_until_ready()
        yield pair
    finally:
        for server in pair:
            server.close()


def test_servers_take_versions_together_whoever_is_killed(zoo, servers):
    said = {weights: zoo.fresh("llama", weights)[1] for weights in "AB"}
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    urls = [server.url for server in servers]
    live, other = "A", "B"
    for number, where in enumerate(KILLED):
        with pytest.raises((AssertionError, EOFError)):
            zoo.run(doomed, None, urls, paths[other], where)
        versions = {server.status()["version"] for server in servers}
        assert len(versions) == 1, f"{where}: {versions}"
        whole = other if versions == {where} else live
        assert (whole == other) == (number >= KILLED.index("at Commit")), where
        for server in servers:  # By hand, what the next trainer does too.
            server.called("reset_prefix_cache?reset_running_requests=true")
            server.called("wake_up?tags=scheduling")
            assert server.say() == said[whole], where
        live, other = ("A", "B") if whole == "B" else ("B", "A")
        assert zoo.run(refitted, None, urls, paths[live], f"after {where}") == 2
        assert [server.say() for server in servers] == [said[live]] * 2, where
        states = [(one["version"], one["session_open"]) for one in (server.status() for server in servers)]
        assert states == [(f"after {where}", False)] * 2

    failure = zoo.run(lost, None, urls, paths[other], servers[1].process.pid)
    assert "TransferAborted" in failure
    assert servers[0].say() == said[live]
    assert zoo.run(refitted, None, urls[:1], paths[other], "last") == 1
    assert servers[0].say() == said[other]
