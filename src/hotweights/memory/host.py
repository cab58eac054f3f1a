"""Host memory: on huge pages, pinned or plain, and how much is left."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

from ..signals import held
from .devices import pinned_empty

ALIGNMENT = 64  # bytes; a cache line, and enough for every dtype
HUGE_PAGE = 2 * 1024 * 1024

_libc = ctypes.CDLL(None, use_errno=True)
_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages under a host tensor that may not have been touched yet. Only advice: it cannot fail.

    Faulting in 4 KiB pages costs about seven times what copying into them does.
    """
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if _MADV_HUGEPAGE is not None and stop - start >= HUGE_PAGE:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(_MADV_HUGEPAGE))


def host_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised contiguous host memory, on huge pages where it is large. The caller's alone."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")  # Not the default one: the caller's code may have set it.
    if tensor.nbytes >= 2 * HUGE_PAGE:
        advise_huge_pages(tensor)
    return tensor


def huge_region(nbytes: int) -> torch.Tensor:
    """``nbytes`` of fresh host memory that starts on a huge page. Without that, direct reads are three times slower."""
    # Private: shared anonymous memory gets no huge pages unless the kernel is told to, and a fork would share it.
    region = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _MADV_HUGEPAGE is not None:
        with contextlib.suppress(OSError):  # A kernel without huge pages; everything works, slower.
            region.madvise(_MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE_PAGE :][:nbytes]


@held  # Else a signal might leave autograd off.
def copy_bytes(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy into ``target`` unseen by autograd; also into tensors that were made under inference mode."""
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        target, value = target.detach(), value.detach()
        for dim, stride in enumerate(target.stride()):  # torch refuses to write to an expanded dimension.
            if stride == 0 and target.shape == value.shape and target.shape[dim] > 1 and value.stride(dim) == 0:
                target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        target.copy_(value)


@held  # Interrupted as it is opened, the file would be forgotten open.
def host_available() -> int | None:
    """Bytes of host memory that can still be taken, by the kernel's estimate; ``None`` where it gives none."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def host_copy(nbytes: int, device: torch.device) -> torch.Tensor:
    """Host memory to copy bytes of ``device`` to: pinned where that is an accelerator."""
    return host_empty((nbytes,), torch.uint8) if device.type == "cpu" else pinned_empty(nbytes)


def scratch(nbytes: int, device: torch.device) -> torch.Tensor:
    """Uninitialised memory on ``device``, for layers that are being loaded."""
    if device.type == "cpu":
        return host_empty((nbytes,), torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
