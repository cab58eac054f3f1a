"""Checkpoints on a server: which bytes are asked for, and that they arrive. No store is needed: a web server is one."""

import json
import re
import threading

import pytest
import torch
from torch import nn

import hotweights as hw
from hotweights.sources.contracts import Addressed, OnDisk, Read
from hotweights.sources.objects.service import Body, Obstore
from hotweights.testing import SOURCE_CONTRACT, write_checkpoint
from hotweights.testing.checkpoints import write_safetensors
from hotweights.testing.checks import assert_same_bits

TENSORS = {
    "embed.weight": torch.randn(33, 17),
    "layers.0.weight": torch.randn(40, 1000).to(torch.bfloat16),
    "three": torch.arange(3, dtype=torch.uint8),
    "layers.1.weight": torch.randn(300, 64),
    "scale": torch.tensor(3.0),
    "empty": torch.empty(0, 7),
    "fp8": torch.randn(16).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
def test_the_contract_of_sources(serve, tmp_path, check):
    address = serve(write_checkpoint(tmp_path, TENSORS, shards=2)).url + "/m"
    check(lambda: hw.open(address), TENSORS)


def test_it_is_addressed_and_says_what_it_is(serve, tmp_path):
    address = serve(write_checkpoint(tmp_path, TENSORS, shards=2)).url + "/m"
    with hw.open(address) as source:
        assert isinstance(source, Addressed)
        assert isinstance(source, OnDisk)
        assert source.files == tuple(f"{address}/model-0000{n}-of-00002.safetensors" for n in (1, 2))
        assert source.file_of("three") == source.files[0]
        assert repr(source) == f"<ObjectSource '{address}': 7 tensors in 2 objects>"
    source.close()
    with pytest.raises(hw.Closed):
        source.check()


@pytest.mark.parametrize("tags", ["strong", "weak", None])
@pytest.mark.parametrize("name", ["", "/", "/model.safetensors"])
def test_one_file_a_folder_and_every_kind_of_tag(serve, tmp_path, tags, name):
    proxy = serve(write_checkpoint(tmp_path, TENSORS), tags=tags)
    with hw.open(f"{proxy.url}/m{name}") as source:
        assert_same_bits(dict(source.tensors()), TENSORS)


def test_an_index_a_list_and_a_subfolder(serve, tmp_path):
    write_checkpoint(tmp_path / "text encoder", TENSORS, shards=3)
    url = serve(tmp_path).url
    folder = f"{url}/m/text%20encoder"
    for what in (
        f"{folder}/model.safetensors.index.json",
        [f"{folder}/model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)],
    ):
        with hw.open(what) as source:
            assert_same_bits(dict(source.tensors()), TENSORS)
    with hw.open(f"{url}/m", subfolder="text encoder") as source:
        assert_same_bits(dict(source.tensors()), TENSORS)


def test_a_small_checkpoint_is_opened_and_read_by_one_request_an_object(serve, tmp_path):
    proxy = serve(write_checkpoint(tmp_path, {"a": torch.arange(9), "b": torch.arange(5)}, shards=2))
    with hw.open(f"{proxy.url}/m/model.safetensors.index.json") as source:
        assert set(dict(source.tensors())) == {"a", "b"}
    assert proxy.ranges == ["bytes=0-65535"] * 3


def test_a_long_header_takes_a_second_request_and_no_third(serve, tmp_path):
    proxy = serve(write_checkpoint(tmp_path, {f"layers.{n}.weight": torch.tensor(n) for n in range(1000)}))
    with hw.open(f"{proxy.url}/m/model.safetensors") as source:
        assert len(source.manifest) == 1000
    assert len(proxy.ranges) == 2


def test_thousands_of_small_tensors_are_one_request(serve, tmp_path):
    tensors = {f"layers.{n}.weight": torch.full((50,), float(n)) for n in range(5000)}
    proxy = serve(write_checkpoint(tmp_path, tensors))
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(5000))
    for layer in model.layers:
        layer.weight = nn.Parameter(torch.zeros(50), requires_grad=False)
    with hw.open(f"{proxy.url}/m/model.safetensors") as source:
        opened = len(proxy.ranges)
        report = hw.load(model, source)
    assert_same_bits(dict(model.state_dict()), tensors)
    assert len(proxy.ranges) - opened == 1
    assert report.bytes_by_io["network"] == 5000 * 200


class Rank(nn.Module):
    """One of two tensor-parallel ranks: half of the rows of each weight."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.up, self.down = (nn.Parameter(torch.zeros(1024, 1024), requires_grad=False) for _ in range(2))

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameters[name].data.copy_(tensor.narrow(0, 1024 * self.rank, 1024))


def test_two_ranks_read_each_its_slices(serve, tmp_path):
    whole = {
        name: torch.arange(2048 * 1024, dtype=torch.float32).view(2048, 1024) + n
        for n, name in enumerate(("up", "down"))
    }
    file = tmp_path / "model.safetensors"
    save_fast(file, whole)
    proxy = serve(tmp_path)
    for rank in range(2):
        model = Rank(rank)
        with hw.open(f"{proxy.url}/m/model.safetensors") as source:
            before = proxy.nbytes
            report = hw.load(model, source)
        half = 2 * 1024 * 1024 * 4
        first = 65536 - header_nbytes(file) if rank == 0 else 0  # What was read with the header is not asked for again.
        assert proxy.nbytes - before == half - first
        assert report.bytes_by_io["network"] == half
        for name, tensor in whole.items():
            assert torch.equal(getattr(model, name), tensor[1024 * rank : 1024 * (rank + 1)])


def save_fast(file, tensors):
    with hw.open(tensors) as source:
        hw.save(source, file)


def header_nbytes(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_tensors_of_any_size_are_as_many_requests_as_their_bytes_need(serve, tmp_path):
    """A request is full to its last byte, also where that lies within a tensor."""
    tensors = {f"{n:02}": torch.full((3_000_000 + n,), n, dtype=torch.uint8) for n in range(8)}
    proxy = serve(write_checkpoint(tmp_path, tensors))
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with hw.open(f"{proxy.url}/m") as source, hw.Pool() as pool:
        before = len(proxy.ranges)
        source.read([Read(name, 0, tensor.nbytes, tensor) for name, tensor in into.items()], pool=pool)
        assert_same_bits(into, tensors)
        assert len(proxy.ranges) - before == -(-24_000_028 // (8 * 1024 * 1024))


def test_rows_with_little_between_them_share_a_request_and_far_ones_do_not(serve, tmp_path):
    """Strided rows are read with what lies between them while that is cheaper than a request for each."""
    save_fast(tmp_path / "model.safetensors", {"near": torch.randn(64, 4096), "far": torch.randn(3, 512 * 1024)})
    proxy = serve(tmp_path)
    expected = hw.open(tmp_path)
    with hw.open(f"{proxy.url}/m/model.safetensors") as source, hw.Pool() as pool, expected:
        tensors = dict(expected.tensors())
        for name, row, rows, requests in (("near", 4096 * 4, 64, 1), ("far", 512 * 1024 * 4, 3, 3)):
            into = torch.zeros(rows, 1024)
            before = len(proxy.ranges)
            source.read([Read(name, n * row + 8192, 4096, into[n]) for n in range(rows)], pool=pool)
            assert torch.equal(into, tensors[name][:, 2048 : 2048 + 1024])
            assert len(proxy.ranges) - before == requests


def test_progress_counts_what_was_wanted_only(serve, tmp_path):
    save_fast(tmp_path / "model.safetensors", {"near": torch.randn(64, 4096)})
    url, seen = serve(tmp_path).url, []
    with hw.open(f"{url}/m/model.safetensors") as source, hw.Pool() as pool:
        into = torch.zeros(64, 1024)
        reads = [Read("near", n * 4096 * 4, 4096, into[n]) for n in range(64)]
        told = source.read(reads, pool=pool, advance=seen.append)
    assert sum(seen) == into.nbytes
    assert told["network"] == 63 * 4096 * 4 + 4096


def test_a_large_tensor_comes_in_parts_at_once(serve, tmp_path):
    tensor = torch.arange(5 * 1024 * 1024, dtype=torch.int32)  # 20 MiB
    save_fast(tmp_path / "model.safetensors", {"large": tensor})
    proxy = serve(tmp_path)
    with hw.open(f"{proxy.url}/m/model.safetensors") as source:
        at_once = threading.Barrier(3, timeout=10)

        def together(handler, *answer):
            at_once.wait()  # Would break if the parts came one after the other.
            return answer

        proxy.faults.extend([together] * 3)
        assert torch.equal(dict(source.tensors())["large"], tensor)
    sizes = [int(last) - int(first) + 1 for first, last in (re.findall(r"\d+", span) for span in proxy.ranges[1:])]
    assert max(sizes) <= 8 * 1024 * 1024


@pytest.mark.parametrize("cached", [False, True])
def test_no_more_is_on_its_way_than_so_many_requests_of_so_many_bytes(serve, tmp_path, monkeypatch, cached):
    """What is on its way, and not in its place, is all that reading holds in memory."""
    proxy = serve(write_checkpoint(tmp_path, {"a": torch.zeros(45_000_000, dtype=torch.uint8)}))
    under_way, most, get = [0, 0], [0, 0], Obstore.get

    async def counting(self, key, start, stop, pin):
        under_way[0], under_way[1] = under_way[0] + 1, under_way[1] + stop - start
        most[:] = map(max, most, under_way)
        body = await get(self, key, start, stop, pin)

        async def chunks():
            async for chunk in body.chunks:
                yield chunk
            under_way[0], under_way[1] = under_way[0] - 1, under_way[1] - (stop - start)

        return Body(body.pin, chunks())

    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    with hw.open(f"{proxy.url}/m", store={"requests": 3}, **options) as source:
        monkeypatch.setattr(Obstore, "get", counting)
        dict(source.tensors())
    assert most[0] == 3
    assert most[1] <= 3 * 8 * 1024 * 1024
    assert under_way == [0, 0]


def test_a_load_is_stopped_while_a_server_says_nothing(serve, tmp_path):
    save_fast(tmp_path / "model.safetensors", {"a": torch.randn(100_000)})
    proxy, stop, begun = serve(tmp_path), threading.Event(), threading.Event()

    def silent(handler, *answer):
        begun.set()
        handler.server.released.wait(30)

    with hw.open(f"{proxy.url}/m/model.safetensors") as source, hw.Pool() as pool:
        proxy.always = silent
        threading.Thread(target=lambda: (begun.wait(10), stop.set())).start()
        with pytest.raises(hw.Closed, match="stopped"):
            source.read([Read("a", 0, 400_000, torch.zeros(100_000))], pool=pool, stop=stop)


def test_closing_ends_a_read_in_another_thread(serve, tmp_path):
    save_fast(tmp_path / "model.safetensors", {"a": torch.randn(100_000)})
    proxy, begun = serve(tmp_path), threading.Event()

    def silent(handler, *answer):
        begun.set()
        handler.server.released.wait(30)

    source = hw.open(f"{proxy.url}/m/model.safetensors")
    proxy.always = silent
    threading.Thread(target=lambda: (begun.wait(10), source.close())).start()
    with pytest.raises(hw.Closed):
        dict(source.tensors())


def test_every_problem_of_the_objects_is_said_as_of_files(serve, tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    raw = (tmp_path / "model-00003-of-00003.safetensors").read_bytes()
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(raw[:-1])
    url = serve(tmp_path).url
    with pytest.raises(hw.CheckpointError) as error:
        hw.open(f"{url}/m")
    text = str(error.value)
    assert "model-00002-of-00003.safetensors: named by the index for" in text
    assert "there is no such file" in text
    assert "are cut off" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"<html>please log in</html>", "this is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ((2**40).to_bytes(8, "little") + b"{}", "header of 1099511627776 bytes"),
    ],
)
def test_what_is_no_checkpoint_is_said(serve, tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(hw.CheckpointError, match=re.escape(says)):
        hw.open(serve(tmp_path).url + "/m/model.safetensors")


def test_nothing_there(serve, tmp_path):
    url = serve(tmp_path).url
    with pytest.raises(hw.CheckpointError, match=r"m/model.safetensors: there is no such"):
        hw.open(url + "/m/model.safetensors")
    with pytest.raises(hw.CheckpointError, match=r"no \*.safetensors in this directory; it is empty"):
        hw.open(url + "/m")


def test_an_index_that_leads_outside_is_refused(serve, tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    index = {"weight_map": {"a": "../m/a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(hw.CheckpointError, match="lies outside the directory"):
        hw.open(serve(tmp_path).url + "/m")


def test_load_update_and_listing_take_addresses(serve, tmp_path):
    write_checkpoint(tmp_path, {"weight": torch.randn(3, 4), "bias": torch.randn(3)})
    address = serve(tmp_path).url + "/m"
    model = nn.Linear(4, 3)
    hw.load(model, address)
    with hw.open(tmp_path) as source:
        assert_same_bits(dict(model.state_dict()), dict(source.tensors()))
    live = hw.LiveModel(nn.Linear(4, 3))
    live.load(tmp_path)
    live.update(address)
    assert torch.equal(live.model.weight, model.weight)
