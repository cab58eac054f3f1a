"""LateDevice: an accelerator for tests on a CPU, whose streams do what is queued on them late, as a seed says.

A copy reads its source and writes its target only when its stream gets to it: when somebody waits for it, asks for it
often enough, or at a moment drawn from the seed. So who uses the source again too early has other bytes copied, and who
reads the target too early reads old ones. A real device is milder: memory that is not page-locked it reads at once.

Tensors on it are torch's own, of the device ``privateuseone:0``, over host memory. What is no copy waits for its
stream.
"""

import ctypes
import random
import sys
import threading
import types
from collections import deque
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map

from hotweights.boxes import box_of, view
from hotweights.memory import host, pool
from hotweights.memory.addresses import buffer

DEVICE = torch.device("privateuseone", 0)

_lock = threading.RLock()
_now = None  # the device that is installed
_kept = []  # Memory of tensors is never given back: a few MB in all.


class Stream:
    """What is queued is done in order, and late."""

    def __init__(self, draw):
        self.device, self._draw, self._work, self.queued, self.done = DEVICE, draw, deque(), 0, 0

    def queue(self, work):
        self._work.append(work)
        self.queued += 1

    def go_on(self, until):
        with _lock:
            while self.done < until:
                self._work.popleft()()
                self.done += 1

    def go_on_a_bit(self):
        self.go_on(min(self.queued, self.done + self._draw()))

    def synchronize(self):
        self.go_on(self.queued)


class Event:
    """Stands for ``torch.Event``."""

    def __init__(self, device=None):
        assert device == DEVICE

    def record(self, stream):
        self._stream, self._at = stream, stream.queued

    def query(self):
        with _lock:
            self._stream.go_on_a_bit()
            return self._stream.done >= self._at


class LateDevice:
    """The device. With seed 0 nothing is done before somebody waits or asks for it.

    Attributes:
        pinned: how many bytes were taken of page-locked memory.
    """

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._eager = 0.0 if seed == 0 else self._random.random() / 2
        self._mine = threading.local()
        self.pinned = 0
        self._streams = []
        self._default = self._made()

    def _made(self):
        self._streams.append(Stream(lambda: self._random.randrange(3)))
        return self._streams[-1]

    def current_stream(self, device):
        """Each thread has its own; where it sets none, that is the default one."""
        assert device == DEVICE
        return getattr(self._mine, "stream", self._default)

    def set_stream(self, stream):
        self._mine.stream = stream

    def synchronize(self, device):
        assert device == DEVICE
        for stream in self._streams:
            stream.synchronize()

    def queue(self, work):
        """Queue it on this thread's stream. Any stream may go on a bit meanwhile."""
        with _lock:
            self.current_stream(DEVICE).queue(work)
            for stream in self._streams:
                if self._random.random() < self._eager:
                    stream.go_on_a_bit()

    @contextmanager
    def another_stream(self):
        """Inside, what this thread queues goes to a stream of its own."""
        before = self.current_stream(DEVICE)
        self.set_stream(self._made())
        try:
            yield
        finally:
            self.set_stream(before)

    @contextmanager
    def installed(self, monkeypatch):
        """Inside, it is the accelerator."""
        global _now
        _register()
        for name in ("current_stream", "set_stream", "synchronize"):
            monkeypatch.setattr(torch.accelerator, name, getattr(self, name))
        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setitem(sys.modules, "torch.privateuseone", types.ModuleType("torch.privateuseone"))
        for module in (pool, host):
            monkeypatch.setattr(module, "pinned_empty", self._pinned)
        _now = self
        try:
            yield self
        finally:
            self.synchronize(DEVICE)
            _now = None

    def _pinned(self, nbytes):
        self.pinned += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)


def put(tensor):
    """The same values on the device, at once."""
    made = _allocated(tensor.shape, tensor.stride(), tensor.dtype)
    of_host(made).copy_(tensor)
    return made


def held(tensor):
    """The values that lie there now, whatever is queued: a copy on the host."""
    with _lock:
        return of_host(tensor.detach()).clone()


# --- tensors ---------------------------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):  # DLPack's
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 2),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_CALLED = b"dltensor"
_EXTENSION, _UINT = 12, 1  # the numbers of "privateuseone" and of unsigned integers

_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def _allocated(size, stride, dtype):
    """Uninitialised memory of the device: all ones, which is NaN."""
    elements = 0 if 0 in size else 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    nbytes = elements * dtype.itemsize
    memory = torch.full((nbytes + 64,), 0xFF, dtype=torch.uint8, device="cpu")
    shape, step = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
    start = -(-memory.data_ptr() // 64) * 64
    tensor = _Tensor(start, (_EXTENSION, DEVICE.index), 1, (_UINT, 8), 1, shape, step)
    _kept.append((memory, tensor))
    raw = torch.utils.dlpack.from_dlpack(_capsule(ctypes.addressof(tensor), _CALLED, None))
    return raw.view(dtype).as_strided(size, stride)


def of_host(value):
    """The same memory as a tensor of the host: it is read and written at once."""
    if not isinstance(value, torch.Tensor):
        return torch.device("cpu") if value == DEVICE else value
    if not value.numel():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    storage = value.untyped_storage()
    return view(torch.frombuffer(buffer(storage.data_ptr(), storage.nbytes()), dtype=torch.uint8), box_of(value))


# --- operations ------------------------------------------------------------------------------------------------------


def _copy(target, source, non_blocking=False):
    of, into = of_host(source), of_host(target)

    def work(keep=(source, target)):
        into.copy_(of)

    _now.queue(work)
    if not non_blocking and (source.is_cpu or target.is_cpu):
        _now.current_stream(DEVICE).synchronize()
    return target


def _empty(size, dtype=None, memory_format=torch.contiguous_format, **_):
    like = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)
    return _allocated(like.shape, like.stride(), like.dtype)


def _empty_strided(size, stride, dtype=None, **_):
    return _allocated(size, stride, dtype or torch.get_default_dtype())


def _do(op, *args, **kwargs):
    """What torch does with tensors of the device."""
    if op.is_view or op._opname == "set_":  # They only look at the tensor's memory.
        return op._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
    _now.current_stream(DEVICE).synchronize()
    given = {}

    def here(value):
        made = of_host(value)
        if isinstance(value, torch.Tensor):
            given[id(made)] = value, made
        return made

    def there(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in given:
            return put(value)
        own, _ = given[id(value)]
        return own if own.shape == value.shape else own.set_(put(value))  # It was resized.

    return tree_map(there, op(*tree_map(here, args), **tree_map(here, kwargs)))


_OWN = {"copy_": _copy, "empty.memory_format": _empty, "empty_strided": _empty_strided}
_libraries = []


class _Guard(torch._C._acc.DeviceGuard):
    """Torch asks which device is the thread's current one."""

    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


def _register():
    """Once in a process. Nothing else of torch's uses this device."""
    if not _libraries:
        _libraries.extend(torch.library.Library(namespace, "IMPL") for namespace in ("_", "aten"))
        torch._C._acc.register_python_privateuseone_device_guard(_Guard())
        _libraries[0].fallback(_do, "PrivateUse1")
        for name, kernel in _OWN.items():
            _libraries[1].impl(name, kernel, "PrivateUse1")
