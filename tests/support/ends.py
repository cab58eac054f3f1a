"""Both ends of a transfer for tests: a sender that goes on sending, receivers in threads, tensors of every kind."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress

import torch

import hotweights as hw

TIMEOUT = 30.0  # seconds; the deadline of whatever must not happen


def receiver(address, **options):
    return hw.Receiver(address, **{"timeout": TIMEOUT, "offer_timeout": TIMEOUT, **options})


def sender(address, **options):
    return hw.Sender(address, **{"timeout": TIMEOUT, "slots": 2, "slot_nbytes": 4096, **options})


def tensors(value=0):
    """Every kind: contiguous or not, empty, 0-dim, odd sizes, larger than a slot of one page."""
    torch.manual_seed(value)
    return {
        "bf16 of three": torch.randn(3).bfloat16(),
        "fp32 after it": torch.randn(5),
        "transposed": torch.randn(7, 9).t(),
        "every second": torch.randn(6, 8)[:, ::2],
        "scalar": torch.tensor(3.0 + value),
        "empty": torch.empty(0, 4),
        "empty twice": torch.empty(3, 0, dtype=torch.int8),
        "large": torch.randn(40, 101),
        "large transposed": torch.randn(33, 71).t(),
        "one large row": torch.randn(2, 3000)[:, 1::2],
        "expanded": torch.randn(1, 5).expand(1000, 5),
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "fp8": torch.randn(10).to(torch.float8_e4m3fn),
        "int64": torch.arange(1000) + value,
        "uint16 turned": torch.arange(12, dtype=torch.int32).to(torch.uint16).view(3, 4).t(),
    }


class Thread(threading.Thread):
    """Runs a function; ``result`` gives what it returned, or raises what it raised."""

    def __init__(self, work, *arguments):
        super().__init__(daemon=True)
        self._work, self._arguments, self._outcome = work, arguments, None
        self.start()

    def run(self):
        try:
            self._outcome = self._work(*self._arguments), None
        except BaseException as error:
            self._outcome = None, error

    def result(self):
        self.join(2 * TIMEOUT)
        assert not self.is_alive(), "it waits for ever"
        result, error = self._outcome
        if error is not None:
            raise error
        return result


@contextmanager
def going_on(address, content, **options):
    """A sender that sends ``content`` again and again to whoever comes, until the end of the ``with``."""
    end = threading.Event()
    with sender(address, **options) as sending:

        def send():
            number = 0
            while not end.is_set():
                number += 1
                with suppress(hw.TransferError, hw.Closed):
                    sending.send(content, version=number)

        thread = Thread(send)
        try:
            yield sending
        finally:
            end.set()
            sending.close()
            thread.result()
