"""A server of vLLM, as TRL asks for one, that loads and takes weights by hotweights."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from drive import PROMPTS
from trained import ENGINE

OURS = ("--load-format", "hotweights", "--weight-transfer-config", '{"backend": "hotweights"}')


class Server:
    """In processes of its own."""

    def __init__(self, model: Path, log: Path, ours: tuple[str, ...] = OURS) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = {key: key.replace("_", "-") for key in ENGINE}
        flags = [f"--{names[key]}" + ("" if value is True else f"={value}") for key, value in ENGINE.items()]
        flags += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--host", "127.0.0.1"]
        flags += ["--worker-extension-cls", "hotweights.engines.vllm.Worker", *ours]
        self.url, self.log, self._model = f"http://127.0.0.1:{port}", log, str(model)
        # The engine in a process of its own, as users have it.
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                    *("--model", self._model, "--port", str(port), *flags),
                ],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        while self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text(errors="replace")[-5000:])

    def called(self, path: str, given: Any = None) -> Any:
        body = None if given is None else json.dumps(given).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def say(self) -> list[int]:
        question = {"model": self._model, "prompt": PROMPTS[1], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        answer = self.called("v1/completions", {**question, "detokenize": False, "return_token_ids": True})
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    def status(self) -> Any:
        (status,) = self.called("collective_rpc", {"method": "hotweights_status", "args": [False]})["results"]
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
