"""Reading bytes by every road, from files and kernels that misbehave."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import hotweights as hw
from hotweights.errors import CheckpointChanged, CheckpointError, Closed, UnknownName, UsageError
from hotweights.memory.addresses import PAGE
from hotweights.sources import Read
from hotweights.sources.files import file as file_module
from hotweights.sources.files import reading
from hotweights.testing import bits, write_safetensors

SLOT = 5 * PAGE  # Three pages of it are data, so most tensors below are larger.
TENSORS = {
    "three": torch.arange(3, dtype=torch.uint8),
    "large": torch.randn(9, 1001),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "page": torch.randint(0, 255, (PAGE,), dtype=torch.uint8),
    **{f"small.{number}": torch.randn(17) for number in range(20)},
    "odd": torch.randint(0, 255, (2 * SLOT + 13,), dtype=torch.uint8),
}
IO = ["auto", "buffered", "direct", "cold"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    assert path.stat().st_size % PAGE
    return path


@pytest.fixture(params=IO)
def io(request, monkeypatch):
    """``cold`` is ``auto`` on a file of which nothing is cached."""
    if request.param == "cold":
        monkeypatch.setattr(file_module, "_NOWAIT", 0)
        return "auto"
    return request.param


@pytest.fixture(autouse=True)
def nothing_is_left():
    threads, fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.fixture
def faults(monkeypatch):
    """``faults(f)`` puts ``f(number, real, fd, buffers, offset)`` in the place of every preadv, counted from 0."""
    real, numbers, lock = os.preadv, [0], threading.Lock()

    def install(fault):
        numbers[0] = 0

        def preadv(fd, buffers, offset, flags=0):
            with lock:
                number, numbers[0] = numbers[0], numbers[0] + 1
            return fault(number, partial(real, fd, buffers, offset, flags), fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        return numbers

    yield install
    monkeypatch.setattr(os, "preadv", real)


def read_all(source, io, *, pool, threads=None, stop=None, advance=None):
    """Every tensor twice: into memory, and in pieces through sinks; the bytes that came."""
    reads, into, pieces, lock = [], {}, {}, threading.Lock()

    def keep(name, start, raw):
        with lock:
            assert start not in pieces[name]
            pieces[name][start] = raw.clone()

    step = min(2 * PAGE, pool.slot_nbytes - 2 * PAGE)
    for name, spec in source.manifest.items():
        into[name], pieces[name] = torch.full((spec.nbytes,), 0xFF, dtype=torch.uint8), {}
        reads.append(Read(name, 0, spec.nbytes, into[name]))
        reads += [
            Read(name, start, min(step, spec.nbytes - start), partial(keep, name, start))
            for start in range(0, spec.nbytes, step)
        ]
    bytes_by_io = source.read(reads, pool=pool, io=io, threads=threads, stop=stop, advance=advance)
    assert sum(bytes_by_io.values()) == 2 * source.manifest.nbytes
    by_sink = {
        name: torch.cat([piece for _, piece in sorted(parts.items())] or [torch.empty(0, dtype=torch.uint8)])
        for name, parts in pieces.items()
    }
    return into, by_sink, bytes_by_io


def assert_reads(path, io, *, slots=2, slot_nbytes=SLOT, threads=None):
    with hw.open(path) as source, hw.Pool(slots, slot_nbytes) as pool:
        into, by_sink, bytes_by_io = read_all(source, io, pool=pool, threads=threads)
        for name, tensor in TENSORS.items():
            assert torch.equal(into[name], bits(tensor)), name
            assert torch.equal(by_sink[name], bits(tensor)), name
        assert pool.stats().leased == 0
    with hw.open(path) as source:
        for name, tensor in source.tensors(io=io):
            assert torch.equal(bits(tensor), bits(TENSORS[name])), name
    with hw.open(path) as source, hw.Pool(slots, slot_nbytes) as pool:
        with source.leases(pool=pool, io=io) as stream:
            for lease in stream:
                assert torch.equal(bits(lease.tensor), bits(TENSORS[lease.name])), lease.name
        assert pool.stats().leased == 0
    return bytes_by_io


def ways(source, io, pool, threads=None):
    """The three ways in which bytes leave a file."""
    return {
        "read": lambda: read_all(source, io, pool=pool, threads=threads),
        "tensors": lambda: dict(source.tensors(io=io)),
        "leases": lambda: drain(source, io, pool),
    }


def drain(source, io, pool):
    with source.leases(pool=pool, io=io) as stream:
        for lease in stream:
            assert torch.equal(bits(lease.tensor), bits(TENSORS[lease.name])), f"{lease.name}: wrong bytes, no error"


def outcome(act):
    """The error that an act raised, or None."""
    try:
        act()
    except Exception as error:
        return error
    return None


WAYS = ["read", "tensors", "leases"]


# --- every I/O path, every size of slot -----------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("slots", "slot_nbytes"), [(1, 3 * PAGE), (1, SLOT), (3, 64 * PAGE)])
def test_every_io_path(path, io, slots, slot_nbytes, threads):
    assert_reads(path, io, slots=slots, slot_nbytes=slot_nbytes, threads=threads)


@pytest.mark.parametrize("slot_nbytes", [1, PAGE, 2 * PAGE])
def test_a_pool_that_is_too_small(path, io, slot_nbytes):
    """It has no room for a page and its margins; splitting by nothing would never end."""
    with hw.open(path) as source, hw.Pool(2, slot_nbytes) as pool:
        memory = torch.empty(3, dtype=torch.uint8)
        with pytest.raises(UsageError, match="too small"):
            source.read([Read("three", 0, 3, memory)], pool=pool, io=io)
        with pytest.raises(UsageError, match="too small"):
            drain(source, io, pool)


def test_the_io_paths_are_told(path):
    """Direct reads need a file system that has them; where the temporary directory has not, all is buffered."""
    with hw.open(path) as source:
        direct = source._shards[0].file.has_direct()
    cached = assert_reads(path, "buffered")
    assert cached["direct"] == 0
    assert assert_reads(path, "direct")["buffered" if direct else "direct"] == 0


@pytest.mark.parametrize("tail", [0, 1, 511, PAGE - 1])
@pytest.mark.parametrize("start", [0, 8, 100, PAGE - 1])
def test_the_end_of_a_file_lies_anywhere(tmp_path, io, start, tail):
    """Direct reads want whole pages; a file ends where it ends."""
    path = tmp_path / "plain"
    content = os.urandom(3 * PAGE + tail)
    path.write_bytes(content)
    memory = torch.full((16 * PAGE,), 0xFF, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % PAGE :][: 8 * PAGE]
    file = file_module.File(str(path))
    data, _ = reading.fill(file, memory, start, len(content), io)
    assert bytes(data.tolist()) == content[start:]
    file.close()


def test_an_unknown_io_path(path):
    with hw.open(path) as source, hw.Pool() as pool, pytest.raises(UnknownName, match="auto, buffered, direct"):
        source.read([], pool=pool, io="mmap")


# --- a kernel that reads less, or not at all -------------------------------------------------------------------------


def short(most):
    """A preadv that reads at most so many bytes; what it did not read is loud."""

    def fault(number, real, fd, buffers, offset):
        assert offset % PAGE == 0 or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT, "a direct read off its page"
        got = real()
        position = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            begin = max(0, most - position)
            if begin < len(view):
                view[begin:] = b"\xee" * (len(view) - begin)
            position += len(view)
        return min(got, most)

    return fault


@pytest.mark.parametrize("most", [5, 68, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 700])
def test_short_reads_are_finished(path, io, faults, most):
    numbers = faults(short(most))
    assert_reads(path, io)
    assert numbers[0] > path.stat().st_size // most


def test_a_file_that_ends_early_without_having_changed(path, io, faults):
    """As some network file systems do. Nothing was read, so nothing may be believed."""
    with hw.open(path) as source, hw.Pool(2, SLOT) as pool:
        for way in WAYS:
            faults(lambda number, real, fd, buffers, offset: 0)
            with pytest.raises(CheckpointChanged, match="ends at byte"):
                ways(source, io, pool)[way]()
            assert pool.stats().leased == 0


@pytest.mark.parametrize("most", [1, 3, 4, 68, 1000, PAGE, 2 * PAGE + 1])
def test_what_is_cached_in_part(path, faults, most):
    """``auto`` takes the cached beginning of each piece in place, and the rest by the other I/O path."""
    shorten = short(most)

    def fault(number, real, fd, buffers, offset):
        if not real.args[-1]:
            return real()
        if offset % 3 == 0:
            raise OSError(errno.EAGAIN, "not cached")
        return shorten(number, real, fd, buffers, offset)

    faults(fault)
    bytes_by_io = assert_reads(path, "auto", slot_nbytes=16 * PAGE)
    assert bytes_by_io["buffered"] > 0


def test_a_naive_reader_leaves_its_memory_as_it_was(path):
    memory = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        os.truncate(path, 100)
        file.readinto(memory)  # Its result says 100; who looks at that?
    assert not any(memory[100:])


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_disk(path, io, faults, threads):
    """At every read in turn: our error, with the file and the byte; no slot, no thread, no descriptor stays."""
    failed, number = True, 0
    while failed:
        place = []

        def fault(now, real, fd, buffers, offset, number=number, place=place):
            if now == number:
                place.append(offset)
                raise OSError(errno.EIO, "Input/output error")
            return real()

        with hw.open(path) as source, hw.Pool(2, SLOT) as pool:
            faults(fault)
            error = outcome(partial(read_all, source, io, pool=pool, threads=threads))
            failed = error is not None
            assert failed == bool(place)
            if failed:
                assert f"{path}: reading at byte {place[0]} failed: Input/output error" in str(error)
                assert isinstance(error, CheckpointError)
                assert isinstance(error.__cause__, OSError)
            assert pool.stats().leased == 0
            faults(lambda number, real, *rest: real())
        number += 1 if number < 6 else 5
    assert number > 10


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_disk_by_each_way(path, io, faults, way):
    for number in (0,) if way == "tensors" else (0, 2):  # All tensors share one read.
        with hw.open(path) as source, hw.Pool(2, SLOT) as pool:

            def fault(now, real, fd, buffers, offset, number=number):
                if now >= number:
                    raise OSError(errno.EIO, "Input/output error")
                return real()

            faults(fault)
            with pytest.raises(CheckpointError, match="Input/output error"):
                ways(source, io, pool)[way]()
            assert pool.stats().leased == 0
            faults(lambda number, real, *rest: real())


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refused", ["open", "read", "later read"])
def test_a_file_system_without_direct_reads(path, io, faults, monkeypatch, refused, error):
    real_open, direct_reads, refusals = os.open, [0], [0]

    def refusing_open(name, flags, *rest, **options):
        if flags & os.O_DIRECT and refused == "open":
            refusals[0] += 1
            raise OSError(error, "no")
        return real_open(name, flags, *rest, **options)

    def refusing_read(number, real, fd, buffers, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct_reads[0] += 1
            if direct_reads[0] > (refused == "later read"):
                refusals[0] += 1
                raise OSError(error, "no")
        return real()

    monkeypatch.setattr(os, "open", refusing_open)
    if refused != "open":
        faults(refusing_read)
    bytes_by_io = assert_reads(path, io)
    assert bytes_by_io["direct"] == 0 or refused == "later read"
    monkeypatch.setattr(os, "open", real_open)
    if io == "direct" and refused != "later read":
        assert refusals[0], "nothing was refused; the test tests nothing"


def test_no_cache_to_ask(path, io, faults, monkeypatch):
    """A file system that does not know RWF_NOWAIT."""
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert_reads(path, io)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs here")
def test_memory_as_a_file_system(io):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / "model.safetensors"
        write_safetensors(path, TENSORS)
        assert_reads(path, io)


# --- a file that changes ---------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def truncate_to_nothing(path):
    os.truncate(path, 0)


def cut_a_page(path):
    os.truncate(path, path.stat().st_size // PAGE * PAGE)


def grow(path):
    os.truncate(path, path.stat().st_size + 1)


def replace(path):
    """As ``save_pretrained`` to the same place: other bytes, same size, same times."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[:-1] + b"\0")
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


def rewrite(path):
    """In place, same size; a second later, as the clock of a fast test would not show."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def delete(path):
    path.unlink()


def turn_into_a_directory(path):
    path.unlink()
    path.mkdir()


CHANGES = [truncate, truncate_to_nothing, cut_a_page, grow, replace, rewrite, delete, turn_into_a_directory]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_open_and_read(path, io, change, way):
    with hw.open(path) as source, hw.Pool(2, SLOT) as pool:
        change(path)
        with pytest.raises(CheckpointChanged) as error:
            ways(source, io, pool)[way]()
        assert str(path) in str(error.value)
        assert pool.stats().leased == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [truncate_to_nothing, replace, rewrite, delete])
def test_a_change_at_any_read(path, io, faults, change, way):
    """The file changes just before the k-th read, for every k. Always an error, whatever had been read by then."""
    content, status = path.read_bytes(), path.stat()
    number, reached = 0, True
    while reached:
        reached = False
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with hw.open(path) as source, hw.Pool(2, SLOT) as pool:

            def fault(now, real, fd, buffers, offset, number=number):
                nonlocal reached
                if now == number:
                    reached = True
                    change(path)
                return real()

            faults(fault)
            error = outcome(ways(source, io, pool, threads=2)[way])
            assert isinstance(error, CheckpointChanged) == reached, f"changed at read {number}: {error!r}"
            assert error is None or str(path) in str(error)
            assert pool.stats().leased == 0
            faults(lambda number, real, *rest: real())
        number += 1 if number < 6 else 5
    assert number > 1


def test_a_mapping_dies_where_we_raise(path):
    """What a reader by mmap does when its file shrinks: it is killed. That is why we do not map."""
    code = (
        "import mmap, os, sys; file = open(sys.argv[1], 'rb'); "
        "view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); os.truncate(sys.argv[1], 0); bytes(view)"
    )
    with hw.open(path) as source, hw.Pool(2, SLOT) as pool:
        died = subprocess.run([sys.executable, "-S", "-c", code, str(path)], timeout=60).returncode
        assert died == -signal.SIGBUS
        with pytest.raises(CheckpointChanged, match=r"ends at byte|size was"):
            read_all(source, "auto", pool=pool)


def test_one_file_of_several(tmp_path):
    """Only what is read is checked, and the message names the file that changed."""
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: torch.zeros(10)})
    with hw.open(sorted(tmp_path.iterdir())) as source, hw.Pool(1, SLOT) as pool:
        truncate(tmp_path / "b.safetensors")
        source.read([Read("a", 0, 40, torch.empty(10))], pool=pool)
        with pytest.raises(CheckpointChanged, match=r"b\.safetensors"):
            source.read([Read("b", 0, 40, torch.empty(10))], pool=pool)


# --- ending early ----------------------------------------------------------------------------------------------------


class Asked(threading.Event):
    """A stop that tells when it has been asked."""

    def __init__(self):
        super().__init__()
        self.asked = threading.Event()

    def is_set(self):
        self.asked.set()
        return super().is_set()


@pytest.mark.parametrize("threads", [1, 3])
def test_stop_before_and_during(path, io, threads):
    stop = threading.Event()
    with hw.open(path) as source, hw.Pool(2, SLOT) as pool:
        read_all(source, io, pool=pool, threads=threads, stop=stop)
        arrived = []

        def advance(nbytes):
            arrived.append(nbytes)
            stop.set()

        with pytest.raises(Closed):
            read_all(source, io, pool=pool, threads=threads, stop=stop, advance=advance)
        assert 0 < len(arrived) <= threads
        with pytest.raises(Closed):
            read_all(source, io, pool=pool, threads=threads, stop=stop, advance=lambda nbytes: pytest.fail("read"))
        assert pool.stats().leased == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_stop_ends_the_wait_for_a_slot(path, threads):
    with hw.open(path) as source, hw.Pool(1, SLOT) as pool:
        held, stop, ended = pool.acquire("somebody"), Asked(), []

        def work():
            try:
                read_all(source, "direct", pool=pool, threads=threads, stop=stop)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert stop.asked.wait(30)
        stop.set()
        pool.wake()
        thread.join(30)
        assert not thread.is_alive()
        assert [type(error) for error in ended] == [Closed]
        held.release()


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["sink", "advance"])
@pytest.mark.parametrize(("threads", "slots"), [(1, 1), (4, 1), (4, 2)])
def test_the_error_of_a_sink_is_the_one_that_is_raised(path, io, where, threads, slots, monkeypatch):
    """Other threads wait for the slot that the failing one holds; that they are stopped must not hide why."""
    work, told = reading._Crew._work, threading.Event()

    def telling(crew):
        try:
            work(crew)
        except Boom:
            told.set()  # From here on every thread can know.
            raise

    monkeypatch.setattr(reading._Crew, "_work", telling)
    for number in range(12):
        calls, lock = [0], threading.Lock()
        told.clear()

        def boom(_, number=number, calls=calls, lock=lock):
            with lock:
                calls[0] += 1
                mine = calls[0]
            if mine == number + 1:
                raise Boom
            assert mine <= number or told.wait(30)

        with hw.open(path) as source, hw.Pool(slots, SLOT) as pool:
            reads = [
                Read("odd", start, 64, boom if where == "sink" else keep)
                for start in range(0, 2 * SLOT, 128)  # No neighbours: each has a read of its own.
            ]
            advance = boom if where == "advance" else None
            try:
                source.read(reads, pool=pool, io=io, threads=threads, advance=advance)
            except Boom:
                assert calls[0] > number
            else:
                assert calls[0] <= number
            assert pool.stats().leased == 0
            assert calls[0] <= number + threads, "the others went on"


def keep(raw):
    assert raw.dtype == torch.uint8


def test_an_interrupt_in_a_sink(path):
    """Ctrl-C reaches the thread that reads, if there is only one."""

    def interrupt(raw):
        raise KeyboardInterrupt

    with hw.open(path) as source, hw.Pool(1, SLOT) as pool:
        for threads in (1, 3):
            with pytest.raises(KeyboardInterrupt):
                source.read([Read("three", 0, 3, interrupt), Read("page", 0, 3, interrupt)], pool=pool, threads=threads)
        assert pool.stats().leased == 0


def test_a_slot_waits_for_the_event_of_its_sink(path, io):
    """The copy happens when the event does, and finds its own bytes."""

    class Copy:
        """A copy that has not happened before it was asked for three times."""

        def __init__(self, raw):
            self.raw, self.asked, self.copied = raw, 0, None

        def query(self):
            self.asked += 1
            if self.asked == 3:
                self.copied = self.raw.clone()
            return self.copied is not None

    copies, naive, right = {}, {}, bits(TENSORS["odd"])

    def sink(start, raw):
        copies[start], naive[start] = Copy(raw), raw
        return copies[start]

    with hw.open(path) as source, hw.Pool(1, SLOT) as pool:
        starts = range(0, 2 * SLOT, 3 * PAGE - 1)[:3]
        reads = [Read("odd", start, 3 * PAGE - 1, partial(sink, start)) for start in starts]
        source.read(reads, pool=pool, io=io, threads=2)
        while pool.stats().leased:
            pass
        # Who keeps the views instead finds another piece in most of them.
        assert sum(torch.equal(raw, right[start : start + len(raw)]) for start, raw in naive.items()) <= 1
    for start in starts:
        assert torch.equal(copies[start].copied, right[start : start + 3 * PAGE - 1])


# --- a file that is closed -------------------------------------------------------------------------------------------


def test_closing_while_reading_is_closed_not_a_bad_descriptor(path, io, faults):
    with hw.open(path) as source, hw.Pool(2, SLOT) as pool:

        def fault(number, real, fd, buffers, offset):
            if number == 1:
                source.close()
            return real()

        faults(fault)
        with pytest.raises(Closed):
            read_all(source, io, pool=pool, threads=1)
        assert pool.stats().leased == 0


def test_close_twice(path):
    file = file_module.File(str(path))
    assert "closed" not in repr(file)
    file.has_direct()
    file.close()
    file.close()
    assert "closed" in repr(file)
    for act in (lambda: file.pread(1, 0), file.check):
        with pytest.raises(Closed):
            act()
    assert not file.has_direct()


# --- reads that are wrong -------------------------------------------------------------------------------------------

WRONG = {
    "past its end": lambda: Read("three", 1, 3, torch.empty(3, dtype=torch.uint8)),
    "before its start": lambda: Read("three", -1, 3, torch.empty(3, dtype=torch.uint8)),
    "less than nothing": lambda: Read("three", 2, -1, torch.empty(0, dtype=torch.uint8)),
    "memory too small": lambda: Read("three", 0, 3, torch.empty(2, dtype=torch.uint8)),
    "memory too large": lambda: Read("three", 0, 3, torch.empty(1)),
    "memory with holes": lambda: Read("three", 0, 3, torch.empty(6, dtype=torch.uint8)[::2]),
    "no memory": lambda: Read("three", 0, 3, torch.empty(3, dtype=torch.uint8, device="meta")),
    "larger than a slot": lambda: Read("odd", 0, 4 * PAGE, lambda raw: None),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_read_that_does_not_fit_is_refused(path, case):
    """Memory is written by address: any of these would read a neighbour, or overwrite a stranger."""
    with hw.open(path) as source, hw.Pool(1, SLOT) as pool:
        good = torch.full((3,), 0xFF, dtype=torch.uint8)
        with pytest.raises(UsageError):
            source.read([Read("three", 0, 3, good), WRONG[case]()], pool=pool)
        assert good.tolist() == [0xFF] * 3, "something was read before everything was checked"


def test_every_sink_is_called_once_even_for_nothing(path, io):
    with hw.open(path) as source, hw.Pool(1, SLOT) as pool:
        seen = []
        source.read([Read("empty", 0, 0, seen.append), Read("page", 9, 0, seen.append)], pool=pool, io=io)
        assert [(raw.dtype, raw.numel()) for raw in seen] == [(torch.uint8, 0)] * 2
