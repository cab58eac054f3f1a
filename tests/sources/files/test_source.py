"""FileSource: leases, owned tensors, and the memory they lie in.

What went wrong in other readers first bites a naive one that is written here.
"""

import json
import threading

import pytest
import torch
from safetensors.torch import save_file

import hotweights as hw
from hotweights.errors import (
    BorrowedTensor,
    CheckpointChanged,
    CheckpointError,
    Closed,
    PoolTimeout,
    StaleLease,
    UsageError,
)
from hotweights.memory.addresses import PAGE
from hotweights.testing import ManualEvent, assert_same_bits, bits, write_checkpoint, write_safetensors

WEIGHTS = {f"layers.{number}.weight": torch.full((64, 65), float(number)) for number in range(16)}


@pytest.fixture
def path(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")  # It pads its header, so every tensor is borrowed.
    return tmp_path / "model.safetensors"


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def one_buffer(tensors):
    """The naive stream: every tensor is handed out in the same memory, as runai's was."""
    memory = torch.empty(max(tensor.numel() * tensor.element_size() for tensor in tensors.values()), dtype=torch.uint8)
    for name, tensor in tensors.items():
        raw = bits(tensor)
        memory[: raw.numel()] = raw
        yield name, memory[: raw.numel()].view(tensor.dtype).view(tensor.shape)


# --- a borrowed tensor that is kept -----------------------------------------------------------------------------------


def test_kept_tensors(path):
    naive = dict(one_buffer(WEIGHTS))
    assert len({tensor.data_ptr() for tensor in naive.values()}) == 1
    assert sum(torch.equal(naive[name], WEIGHTS[name]) for name in WEIGHTS) == 1  # 15 of 16 are wrong.

    with hw.open(path) as source:
        kept = dict(source.tensors())
    assert_same_bits(kept, WEIGHTS)
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept.values()}) == len(WEIGHTS)
    kept["layers.0.weight"].fill_(7)
    assert_same_bits(kept | {"layers.0.weight": WEIGHTS["layers.0.weight"]}, WEIGHTS)


def test_kept_leases_are_stale_and_owned_ones_are_not(path):
    with hw.open(path) as source, hw.Pool(2, 8 * PAGE) as pool, source.leases(pool=pool) as stream:
        leases, owned = [], {}
        for lease in stream:
            leases.append(lease)
            owned[lease.name] = lease.own()
    for lease in leases:
        with pytest.raises(StaleLease, match=lease.name):
            _ = lease.tensor
    assert_same_bits(owned, WEIGHTS)


# --- a view that is kept past its bucket ------------------------------------------------------------------------------


def test_kept_views(path):
    naive = {name: tensor.t()[1:] for name, tensor in one_buffer(WEIGHTS)}
    assert not torch.equal(naive["layers.0.weight"], WEIGHTS["layers.0.weight"].t()[1:])

    with hw.open(path) as source, hw.Pool(2, 8 * PAGE, guard="trap") as pool, source.leases(pool=pool) as stream:
        views = {lease.name: lease.tensor.t()[1:] for lease in stream}
        for name, view in views.items():
            with pytest.raises(StaleLease, match=name):
                view.sum()

    with hw.open(path) as source, hw.Pool(2, 8 * PAGE, guard="poison") as pool, source.leases(pool=pool) as stream:
        lease = next(stream)
        first = lease.tensor
        lease.release()
        assert first.isnan().all()


@pytest.mark.parametrize("guards", [("trap", "off"), ("poison", "off"), ("off", "trap"), ("poison", "trap")])
def test_of_the_guards_of_a_stream_and_its_pool_the_stricter_holds(path, guards):
    asked, of_pool = guards
    with (
        hw.open(path) as source,
        hw.Pool(2, 8 * PAGE, guard=of_pool) as pool,
        source.leases(guard=asked, pool=pool) as stream,
    ):
        lease = next(stream)
        kept, raw = lease.tensor, lease.raw
        lease.release()
        if "trap" in guards:
            with pytest.raises(StaleLease, match=lease.name):
                kept.sum()
            kept, raw = (tensor._inner for tensor in (kept, raw))
        assert kept.isnan().all()
        assert (raw == 0xFF).all()


def test_an_open_source_needs_no_opening(path):
    with hw.open(path) as source, pytest.raises(hw.UsageError, match="this FileSource is an open source; use it as"):
        hw.open(source)


def test_a_guard_that_nobody_knows(path):
    with hw.open(path) as source, hw.Pool(2, 8 * PAGE) as pool, hw.open(WEIGHTS) as mapping:
        for stream in (lambda: source.leases(guard="traps", pool=pool), lambda: mapping.leases(guard="traps")):
            with pytest.raises(hw.UnknownName, match="known are: off, poison, trap"):
                stream()


def test_without_a_guard_it_bites_us_too(path):
    """What the guards are for: a kept view of a pool's memory holds another tensor, silently."""
    with hw.open(path) as source, hw.Pool(1, 8 * PAGE) as pool, source.leases(pool=pool) as stream:
        kept = next(stream).tensor
        assert torch.equal(kept, WEIGHTS["layers.0.weight"])
        next(stream)
        assert not torch.equal(kept, WEIGHTS["layers.0.weight"])


def test_a_borrowed_tensor_is_not_written(path):
    with hw.open(path) as source, source.leases(guard="trap") as stream:
        lease = next(stream)
        with pytest.raises(BorrowedTensor, match=lease.name):
            lease.tensor.zero_()
        lease.own().zero_()
        assert torch.equal(lease.tensor, WEIGHTS[lease.name])


# --- larger than a slot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2])
def test_a_tensor_larger_than_a_slot(tmp_path, slots):
    large = {"small": torch.randn(5), "large": torch.randn(100_003), "last": torch.randn(3)}
    bucket = torch.empty(64 * 1024, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"):
        bucket[: large["large"].nbytes].copy_(bits(large["large"]))  # The naive bucket.

    write_safetensors(tmp_path / "model.safetensors", large)
    for guard in ("off", "poison", "trap"):
        with hw.open(tmp_path) as source, hw.Pool(slots, 16 * PAGE, guard=guard) as pool:
            owned, borrowed = {}, {}
            with source.leases(pool=pool) as stream:
                for lease in stream:
                    assert torch.equal(lease.tensor.clone(), large[lease.name])
                    owned[lease.name], borrowed[lease.name] = lease.own(), lease.borrowed
            assert_same_bits(owned, large)
            assert borrowed == {"small": True, "large": False, "last": True}
            assert pool.stats().leased == 0
            assert pool.stats().touched_nbytes <= slots * 16 * PAGE


# --- a mix of dtypes that does not align ------------------------------------------------------------------------------


def test_a_float32_behind_three_bfloat16(tmp_path):
    mixed = {
        "three": torch.randn(3).to(torch.bfloat16),
        "float": torch.randn(5),
        "byte": torch.tensor([1], dtype=torch.uint8),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "complex": torch.randn(3, dtype=torch.complex64),
        "flag": torch.tensor(True),
        "long": torch.arange(4),
    }
    packed = torch.cat([bits(tensor) for tensor in mixed.values()])
    with pytest.raises(RuntimeError, match="divisible"):
        packed[6:26].view(torch.float32)  # The naive packing.

    write_safetensors(tmp_path / "model.safetensors", mixed)
    for guard in ("off", "poison", "trap"):
        with hw.open(tmp_path) as source, source.leases(guard=guard) as stream:
            seen = {}
            for lease in stream:
                seen[lease.name] = lease.own()
                assert lease.raw.numel() == lease.spec.nbytes
                if guard != "trap":
                    assert lease.tensor.data_ptr() % lease.tensor.element_size() == 0
            assert_same_bits(seen, mixed)
    with hw.open(tmp_path) as source:
        assert_same_bits(dict(source.tensors()), mixed)


# --- nothing, and nought dimensions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("empty", "scalar", "wide"), ("scalar", "wide", "empty"), ("wide", "empty")])
def test_empty_and_scalar_tensors(tmp_path, order):
    all_of_them = {"empty": torch.empty(0), "scalar": torch.tensor(3.0), "wide": torch.empty(7, 0, 2**40)}
    tensors = {name: all_of_them[name] for name in order}
    with pytest.raises(ValueError, match="0"):
        torch.frombuffer(bytearray(), dtype=torch.float32)  # The naive carrier.

    write_safetensors(tmp_path / "model.safetensors", tensors)
    for guard in ("off", "poison", "trap"):
        with hw.open(tmp_path) as source:
            assert_same_bits(dict(source.tensors()), tensors)
            with source.leases(guard=guard) as stream:
                assert_same_bits({lease.name: lease.own() for lease in stream}, tensors)


def test_a_file_of_nothing(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {})
    with hw.open(tmp_path) as source:
        assert dict(source.tensors()) == dict(source.manifest) == {}
        with source.leases() as stream:
            assert list(stream) == []
            with pytest.raises(StopIteration):
                next(stream)


# --- not contiguous ---------------------------------------------------------------------------------------------------


def test_strided_tensors(tmp_path):
    wide = torch.randn(6, 8)
    strided = {
        "t": wide.t(),
        "columns": wide[:, ::2],
        "row": wide[3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    storage = strided["t"].untyped_storage()  # The naive carrier sends the storage, in the storage's order.
    assert not torch.equal(torch.tensor([], dtype=torch.float32).set_(storage).view(8, 6), strided["t"])

    plain = {name: tensor.resolve_conj().resolve_neg().contiguous() for name, tensor in strided.items()}
    with hw.open(strided) as source:
        owned = dict(source.tensors())
        assert all(tensor.is_contiguous() for tensor in owned.values())
        assert all(torch.equal(owned[name], plain[name]) for name in plain)
        with source.leases() as stream:
            for lease in stream:
                assert torch.equal(lease.tensor, plain[lease.name])
                assert torch.equal(lease.own(), plain[lease.name])
    for name in ("t", "columns", "row", "expanded", "channels"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: strided[name]})
    with hw.open(sorted(tmp_path.iterdir())) as source:
        for name, tensor in source.tensors():
            assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize("name", ["conj", "negative"])
def test_the_bytes_of_lazy_views(name):
    value = torch.randn(3, dtype=torch.complex64).conj()
    value = value if name == "conj" else value.imag
    right = bits(value.resolve_conj().resolve_neg().clone())
    with hw.open({"w": value}) as source, source.leases() as stream:
        assert torch.equal(next(stream).raw, right)


# --- one name twice ---------------------------------------------------------------------------------------------------


def test_one_name_twice(tmp_path):
    bucket = [("w", torch.zeros(2)), ("w", torch.ones(2))]
    assert dict(bucket)["w"].tolist() == [1, 1]  # The naive bucket takes the last.
    with pytest.raises(UsageError, match="twice"):
        hw.Manifest(hw.TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket)
    for name, tensor in bucket:
        write_safetensors(tmp_path / f"{int(tensor[0])}.safetensors", {name: tensor})
    with pytest.raises(CheckpointError, match=r"'w'.*again"):
        hw.open(tmp_path)
    entry = json.dumps({"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})
    text = f'{{"w": {entry}, "w": {entry}}}'.encode()
    (tmp_path / "0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    with pytest.raises(CheckpointError, match="'w' occurs twice"):
        hw.open(tmp_path / "0.safetensors")


# --- leases and their pool -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("taken", [0, 1, 5, 16])
def test_a_stream_left_early_gives_every_slot_back(path, slots, taken):
    """The one that was read ahead too."""
    with hw.open(path) as source, hw.Pool(slots, 8 * PAGE) as pool:
        with source.leases(pool=pool) as stream:
            for _ in range(taken):
                next(stream)
        assert pool.stats().leased == 0
        with source.leases(pool=pool) as stream:
            assert_same_bits({lease.name: lease.own() for lease in stream}, WEIGHTS)


def test_a_stream_that_is_never_begun(path):
    with hw.open(path) as source, hw.Pool(2, 8 * PAGE) as pool:
        stream = source.leases(pool=pool)
        stream.close()
        stream.close()
        with pytest.raises(Closed):
            next(stream)
        source.leases().close()


def test_a_lease_is_the_right_to_its_slot(path):
    """The slot waits for the event that a lease was released with, and the stream waits for the slot."""
    with hw.open(path) as source, hw.Pool(1, 8 * PAGE) as pool, source.leases(pool=pool) as stream:
        lease, event = next(stream), ManualEvent()
        memory = lease.tensor
        lease.release(after=event)
        with pytest.raises(PoolTimeout, match=lease.name):
            pool.acquire("somebody", timeout=0.01)
        assert torch.equal(memory, WEIGHTS[lease.name])
        event.happen()
        next(stream)


def test_closing_from_another_thread_ends_the_wait(path):
    """A consumer that waits for a slot which never comes free is told that its stream was closed."""
    for slots in (1, 2):
        with hw.open(path) as source, hw.Pool(slots, 8 * PAGE) as pool:
            held = [pool.acquire("somebody") for _ in range(slots)]
            waits = threading.Event()
            acquire = pool.acquire

            def asked(holder, *, timeout=60.0, stop=bool, acquire=acquire, waits=waits):
                def ask():
                    waits.set()
                    return stop()

                return acquire(holder, timeout=timeout, stop=ask)

            pool.acquire = asked
            stream, ended = source.leases(pool=pool), []

            def consume(stream=stream, ended=ended):
                try:
                    next(stream)
                except BaseException as caught:
                    ended.append(caught)

            thread = threading.Thread(target=consume, daemon=True)
            thread.start()
            assert waits.wait(30)
            stream.close()
            thread.join(30)
            assert not thread.is_alive()
            assert [type(error) for error in ended] == [Closed]
            for slot in held:
                slot.release()
            assert pool.stats().leased == 0


def test_an_error_is_not_an_end(path):
    """After a failure the stream is closed; a second loop over it must not look complete."""
    with hw.open(path) as source, hw.Pool(2, 8 * PAGE) as pool:
        stream = source.leases(pool=pool)
        next(stream)
        path.unlink()
        with pytest.raises(CheckpointError):
            list(stream)
        with pytest.raises(Closed):
            list(stream)
        assert pool.stats().leased == 0


@pytest.mark.parametrize("size", [8 * PAGE, 4 * PAGE], ids=["in a slot", "larger than a slot"])
def test_no_lease_of_a_file_that_changed(path, size):
    """The first one already says so; nobody sees bytes of another file."""
    with hw.open(path) as source, hw.Pool(2, size) as pool, source.leases(pool=pool) as stream:
        save_file({name: tensor + 1 for name, tensor in WEIGHTS.items()}, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
        with pytest.raises(CheckpointChanged, match="replaced"):
            next(stream)


def test_a_source_closed_under_a_stream(path):
    with hw.open(path) as source, hw.Pool(1, 8 * PAGE) as pool, source.leases(pool=pool) as stream:
        next(stream)
        source.close()
        with pytest.raises(Closed):
            list(stream)
        assert pool.stats().leased == 0
    with hw.open(path) as source:
        tensors = source.tensors()
        source.close()
        with pytest.raises(Closed):
            list(tensors)


def test_a_body_that_raises(path):
    with hw.open(path) as source, hw.Pool(2, 8 * PAGE) as pool:
        with pytest.raises(ZeroDivisionError), source.leases(pool=pool) as stream:
            [1 / 0 for _ in stream]
        assert pool.stats().leased == 0


def test_tensors_may_be_left_early(path):
    with hw.open(path) as source:
        tensors = source.tensors()
        next(tensors)
        tensors.close()


def test_small_neighbours_share_a_slot(path):
    """Sixteen tensors of 16.25 KiB, and room for three of them in a slot of 64 KiB."""
    with hw.open(path) as source, hw.Pool(2, 16 * PAGE) as pool:
        acquire, fills = pool.acquire, []
        pool.acquire = lambda holder, **options: fills.append(holder) or acquire(holder, **options)
        with source.leases(pool=pool) as stream:
            assert_same_bits({lease.name: lease.own() for lease in stream}, WEIGHTS)
        assert fills == [list(source.manifest)[number] for number in range(0, 16, 3)]
        assert pool.stats().peak <= 2


# --- what a source says of itself ------------------------------------------------------------------------------------


def test_positions_files_and_metadata(tmp_path):
    write_checkpoint(tmp_path, WEIGHTS, shards=3)
    write_safetensors(tmp_path / "alone", {"w": torch.zeros(1)}, metadata={"format": "pt"})
    with hw.open(tmp_path) as source:
        places = [source.position(name) for name in source.manifest]
        assert places == sorted(places)
        for name, tensor in WEIGHTS.items():
            file, offset = source.position(name)
            with open(source.files[file], "rb") as raw:
                raw.seek(offset)
                assert raw.read(tensor.nbytes) == bytes(bits(tensor).tolist())
        assert source.metadata == {key: {} for key in source.files}
        assert "16 tensors in 3 files" in repr(source)
    with hw.open(tmp_path / "alone") as source:
        assert source.metadata == {str(tmp_path / "alone"): {"format": "pt"}}


@pytest.mark.parametrize("what", [None, 7, b"model.safetensors", [torch.zeros(1)]])
def test_what_is_no_source(what):
    with pytest.raises(UsageError, match=type(what).__name__):
        hw.open(what)
