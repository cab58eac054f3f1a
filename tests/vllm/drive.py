"""Engines in processes of their own, forked from one that has imported vLLM; and what they said, kept by question."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import cases

PROMPTS = [[number * 7 % 900 + 1 for number in range(count)] for count in (3, 17, 200)]
"""The last is longer than a block of the prefix cache."""

OPTIONS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "dtype": "bfloat16",
    "kv_cache_memory_bytes": 64 << 20,
}
OURS = {"load_format": "hotweights", "worker_extension_cls": "hotweights.engines.vllm.Worker"}

Script = Callable[..., Any]
"""Called in a process of its own with what is given, after a ``Talker`` if there is one; its result must pickle."""


class Talker:
    """An engine, in its process."""

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        from vllm import LLM

        if options.get("tensor_parallel_size", 1) > 1:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        self.llm = LLM(path, **{**OPTIONS, **options})

    def tokens(self) -> list[list[int]]:
        """What it says, greedily."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        return [[*out.outputs[0].token_ids] for out in self.llm.generate(prompts, greedy, use_tqdm=False)]

    @property
    def model(self) -> Any:
        """The model itself, of an engine in this process."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.get_model()


def _work(script: Script, path: str | None, options: Mapping[str, Any], given: tuple[Any, ...], pipe: Any) -> None:
    try:
        engine = () if path is None else (Talker(path, options),)
        pipe.send((script(*engine, *given), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        raise


def _serve(
    script: Script,
    path: str,
    options: Mapping[str, Any],
    before: Callable[[], None] | None,
    pipe: Any,
    started: Any,
) -> None:
    try:
        if before is not None:
            before()
        talker = Talker(path, options)
    except BaseException:
        started.send(traceback.format_exc())
        raise
    started.send(None)
    script(talker, pipe)


def say(talker: Talker) -> list[list[int]]:
    """The script that asks for tokens."""
    return talker.tokens()


class Zoo:
    """Checkpoints in ``directory``, and engines that were asked."""

    environment: ClassVar = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # Functions of tests are called in workers.
    }

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["preload"])
        self._said: dict[Any, Any] = {}

    def checkpoint(self, name: str, weights: str) -> Path:
        """That of a case; ``weights`` is ``"A"`` or ``"B"``, or any other letter."""
        path = self.directory / name / weights
        if not path.exists():
            path.mkdir(parents=True)
            cases.make(name, ord(weights), path)
        return path

    def run(
        self,
        script: Script,
        path: Path | None,
        *given: Any,
        options: Mapping[str, Any] | None = None,
        seconds: float = 600,
    ) -> Any:
        """What ``script`` returns in a fresh process, with an engine for ``path`` if there is one."""
        ours, theirs = self._context.Pipe()
        where = None if path is None else str(path)
        process = self._context.Process(target=_work, args=(script, where, options or {}, given, theirs))
        process.start()
        theirs.close()
        try:
            assert ours.poll(seconds), "the engine did not answer"
            result, error = ours.recv()
        finally:
            process.join(10)
            process.kill()
            process.join()
            process.close()
            ours.close()
        assert error is None, error
        return result

    @contextmanager
    def serving(
        self,
        script: Script,
        path: Path,
        *,
        options: Mapping[str, Any],
        before: Callable[[], None] | None = None,
        seconds: float = 600,
    ) -> Iterator[Any]:
        """An engine in a process of its own, where ``script`` does what comes by the pipe that this yields.

        ``before`` is called there before the engine is made.
        """
        ours, theirs = self._context.Pipe()
        started, start = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(script, str(path), options, before, theirs, start))
        process.start()
        theirs.close()
        start.close()
        try:
            assert started.poll(seconds), "the engine did not start"
            error = started.recv()
            assert error is None, error
            yield ours
        finally:
            ours.close()
            started.close()
            process.join(10)
            process.kill()
            process.join()
            process.close()

    def fresh(self, name: str, weights: str, **options: Any) -> list[list[int]]:
        """What a fresh engine says, loaded by vLLM's own default."""
        key = (name, weights, *options)
        if key not in self._said:
            options = {**{**cases.CASES, **cases.MORE}[name].engine, **options}
            self._said[key] = self.run(say, self.checkpoint(name, weights), options=options)
        return self._said[key]
