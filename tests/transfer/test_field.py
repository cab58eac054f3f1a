"""What bit others in transfers, first in code that is wrong."""

import os
import pickle
import threading
from multiprocessing.shared_memory import SharedMemory

import pytest
import torch
from ends import TIMEOUT, Thread, receiver, sender

import hotweights as hw
from hotweights.errors import ProtocolError
from hotweights.testing import assert_same_bits
from hotweights.transfer.messages import decode
from hotweights.transfer.peers import PeerGroup
from hotweights.transfer.states import Session, SessionState, Side

BUCKET = 4096  # bytes, of the naive code and of our slots


class Bucket:
    """How buckets are written at first: tensors one behind the other, found again by offset."""

    def __init__(self):
        self.memory, self.meta, self.offset = torch.zeros(BUCKET, dtype=torch.uint8), {}, 0

    def put(self, name, tensor):
        if self.offset + tensor.nbytes > BUCKET:
            raise AssertionError("the tensor is larger than the bucket")
        self.memory[self.offset : self.offset + tensor.nbytes] = tensor.view(-1).view(torch.uint8)
        self.meta[name] = (self.offset, tensor.nbytes, tensor.dtype, tensor.shape)
        self.offset += tensor.nbytes

    def get(self, name):
        offset, nbytes, dtype, shape = self.meta[name]
        return self.memory[offset : offset + nbytes].view(dtype).view(shape)


def carried(pairs, address):
    """What arrives of these pairs by ours, with slots as small as the bucket."""

    def take():
        with receiver(address) as source:
            return dict(source.tensors())

    taking = Thread(take)
    with sender(address, slot_nbytes=BUCKET) as sending:
        sending.send(pairs, version=1)
    return taking.result()


@pytest.mark.parametrize(
    ("pairs", "bites"),
    [
        pytest.param([("w", torch.randn(3000))], AssertionError, id="larger than the bucket"),
        pytest.param([("bf16", torch.randn(3).bfloat16()), ("fp32", torch.randn(2))], RuntimeError, id="an odd offset"),
        pytest.param([("w", torch.randn(4, 6).t())], RuntimeError, id="transposed"),
        pytest.param([("w", torch.randn(4, 6)[:, ::2])], RuntimeError, id="every second column"),
    ],
)
def test_tensors_that_do_not_fit_the_naive_bucket_are_carried(pairs, bites, address):
    bucket = Bucket()

    def naive():
        for name, tensor in pairs:
            bucket.put(name, tensor)
        return [bucket.get(name) for name, _ in pairs]

    with pytest.raises(bites):
        naive()
    assert_same_bits(carried(pairs, address), dict(pairs))


def test_empty_and_scalar_tensors_are_carried(address):
    """A buffer of no bytes cannot even be had."""
    with pytest.raises(ValueError, match="both buffer length"):
        torch.frombuffer(bytearray(), dtype=torch.float32)
    content = {"empty": torch.empty(0), "scalar": torch.tensor(3.0), "rows": torch.empty(3, 0)}
    assert_same_bits(carried(content, address), content)


def test_two_tensors_of_one_name_are_refused(address):
    """The second silently takes the first one's place."""
    pairs = [("w", torch.zeros(2)), ("w", torch.ones(2))]
    bucket = Bucket()
    for name, tensor in pairs:
        bucket.put(name, tensor)
    assert list(bucket.meta) == ["w"]
    with sender(address) as sending, pytest.raises(hw.UsageError, match="one name: w"):
        sending.send(pairs, version=1)


def test_release_is_the_acknowledgement(address, monkeypatch):
    """Acknowledged when it came and not when it was read, a bucket is filled again under its reader."""
    bucket = Bucket()
    bucket.put("w0", torch.zeros(1000))
    acknowledged, reading = bucket.get("w0"), torch.empty(1000)
    bucket.memory.view(torch.float32)[:1000] = 1.0  # The sender had its acknowledgement.
    reading.copy_(acknowledged)
    assert reading.tolist() == [1.0] * 1000, "the naive reader reads another tensor"

    content = {f"w{number}": torch.full((1000,), float(number)) for number in range(6)}
    held, full, go_on, sent = (threading.Event() for _ in range(4))
    wait = PeerGroup.wait

    def waiting(group, peers, seconds, **options):
        if seconds and [len(peer.holds) for peer in group.peers] == [2]:
            full.set()
        return wait(group, peers, seconds, **options)

    monkeypatch.setattr(PeerGroup, "wait", waiting)

    def read():
        with receiver(address) as source, source.leases() as stream:
            lease = next(stream)
            held.set()
            assert go_on.wait(TIMEOUT)
            assert lease.tensor.tolist() == [0.0] * 1000
            return 1 + sum(1 for _ in stream)

    def send():
        with sender(address, slots=2, slot_nbytes=BUCKET, digests=False) as sending:
            sending.send(content, version=1)
            sent.set()

    threads = [Thread(read), Thread(send)]
    assert held.wait(TIMEOUT)
    assert full.wait(TIMEOUT), "the sender does not wait for a slot, and has four more tensors to send"
    assert not sent.is_set()
    go_on.set()
    assert threads[0].result() == 6
    threads[1].result()


def test_segments_with_names_outlive_those_who_made_them(address, tmp_path):
    """A killed process leaves its segment; ours has no name to leave."""
    left = SharedMemory(create=True, size=BUCKET)
    assert os.path.exists(f"/dev/shm/{left.name}")  # until somebody unlinks it
    left.close()
    left.unlink()
    before = sorted(os.listdir("/dev/shm"))
    with sender(address):
        assert sorted(os.listdir("/dev/shm")) == before


def test_a_pickle_is_not_opened(tmp_path):
    """Unpickling runs what the other side wrote."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    raw = pickle.dumps(Evil())
    pickle.loads(raw)
    assert (tmp_path / "owned").exists()
    os.rmdir(tmp_path / "owned")
    with pytest.raises(ProtocolError):
        decode(raw)
    assert not (tmp_path / "owned").exists()


def test_a_word_of_an_earlier_update_is_refused():
    """Without an id an old word is as good as a new one."""
    session = Session(Side.RECEIVER)
    session.state, session.update = SessionState.PREPARED, 8
    with pytest.raises(ProtocolError, match="'commit' of update 7 is stale"):
        session.came("commit", 7)
    session.came("commit", 8)
