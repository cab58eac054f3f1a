"""Measures what the decision costs a lead's processor with many members. They are simulated: no connection is made.

    python benchmarks/decision.py                 # 1,000 members
    python benchmarks/decision.py --members 125   # as many relays, one on each host

* *votes*: what follows from all votes, as it is asked each time that one is lost, and at the end.
* *names*: the message that ends the stream, with all who are to vote, encoded once for each member.
* *pasts*: what each member tells the next lead after its sender was lost, encoded and decoded.
* *verdict*: what follows from all of that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hotweights.transfer.decision import Decision, Known, Vote, of_lead
from hotweights.transfer.doubts import doubts_of
from hotweights.transfer.messages import HEADER, SEATS_NAMED, Account, End, Past, Seat, decode, encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    count = options.members
    named = [f"rank{place} (process 4711 on gpu7)" if place < SEATS_NAMED else "" for place in range(count)]
    seats = tuple(Seat(place, 1, name) for place, name in enumerate(named))
    pasts = [Past(1, (Account(2**61, place, Known.IN_DOUBT, "step-200", seats),)) for place in range(count)]
    frames = [encode(0, past) for past in pasts]

    def votes() -> None:
        assert of_lead([Vote.PREPARED] * count, drop=False) is Decision.COMMIT

    def names() -> None:
        for _ in range(count):
            encode(1, End(seats))

    def told() -> list[Any]:
        return [decode(encode(0, past)[HEADER.size :]) for past in pasts]

    peers = [SimpleNamespace(accounts=past.accounts) for past in told()]

    def verdict() -> None:
        (doubt,) = doubts_of(peers)  # type: ignore[arg-type]
        assert doubt.decision is Decision.ABORT

    print(f"{count} members; a past has {len(frames[0])} bytes, the names have {len(encode(1, End(seats)))}")
    for name, work in {"votes": votes, "names": names, "pasts": told, "verdict": verdict}.items():
        print(f"{name:>8}: {1000 * _seconds(work, options.repeats):8.2f} ms")


def _seconds(work: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main()
