"""Fleet: what a version costs between many hosts, on paper. It connects to nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from ..errors import UsageError
from ..text import size, some

# Measured: a sender with 1,000 connections, two processors; benchmarks/decision.py counts parts of it again.
_ANSWER, _PREPARE, _COMMIT = 1.55e-3, 0.08e-3, 0.10e-3  # seconds for each relay
_SPEC = 69  # bytes of a tensor in an offer: 4.8 MB for 70,000
_ONCE = 6  # messages with each relay: offer, accept, end, prepared, commit, done
_CHAINED = 1.2  # times one hop: 512 MB at a limited rate took 2.4 s to one host, and 2.9 s to two in a chain


@dataclass(frozen=True, slots=True)
class Fleet:
    """Sizes of a fleet.

    Attributes:
        parameters: of the model.
        bytes_per_parameter: 2 of bfloat16.
        tensors: of the checkpoint.
        hosts: with workers, one relay each.
        hosts_per_copy: hosts over which the workers spread one model; each needs its part only.
        workers: on each host.
        trainer_hosts: over which the trainer's ranks spread.
        gbits: of a host's network, each way, in Gbit/s.
        slot: bytes of a slot.
        slots: how many a relay has.
    """

    parameters: float = 1e12
    bytes_per_parameter: float = 2.0
    tensors: float = 70_000
    hosts: float = 125
    hosts_per_copy: float = 4
    workers: float = 8
    trainer_hosts: float = 32
    gbits: float = 3200
    slot: float = 64 * 2**20
    slots: float = 4

    @property
    def per_host(self) -> float:
        """Bytes that a host needs."""
        return self.parameters * self.bytes_per_parameter / self.hosts_per_copy

    @property
    def network(self) -> float:
        """Bytes that go to hosts, each once for its relay."""
        return self.per_host * self.hosts

    @property
    def rate(self) -> float:
        """Bytes a second into a host, and out of one."""
        return self.gbits * 1e9 / 8

    def as_dict(self) -> dict[str, float]:
        """The sizes, and what follows from them: bytes, seconds and numbers of messages."""
        arrival = self.per_host / self.rate
        chains = max(1, min(math.floor(self.trainer_hosts), math.ceil(self.hosts)))
        depth = math.ceil(self.hosts / chains)
        slots_per_host = math.ceil(self.per_host / self.slot)
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "host_nbytes": self.per_host,
            "network_nbytes": self.network,
            "without_relays_nbytes": self.network * self.workers,
            "relay_nbytes": self.slot * self.slots,
            "seconds_into_a_host": arrival,
            "seconds_from_trainers": max(arrival, self.network / (self.trainer_hosts * self.rate)),
            "seconds_by_chains": (arrival if depth == 1 else arrival * _CHAINED) + (depth - 1) * self.slot / self.rate,
            "seconds_from_one_host": max(arrival, self.network / self.rate),
            "chains": chains,
            "hosts_in_a_chain": depth,
            "messages_per_host": _ONCE + 2 * slots_per_host,
            "offer_nbytes": self.tensors * _SPEC,
            "seconds_to_decide": self.hosts * (_ANSWER + _PREPARE + _COMMIT),
        }

    def __str__(self) -> str:
        facts = self.as_dict()
        chains = f"{facts['chains']:g} chains of {facts['hosts_in_a_chain']:g}"
        relays = f"{self.hosts:g} relays"
        return "\n".join(
            f"{title:>24}  {words}"
            for title, words in (
                ("a host needs", f"{size(int(self.per_host))}, for {self.workers:g} workers"),
                ("over the network", f"{size(int(self.network))} to {relays}, each byte once for a host"),
                ("without relays", f"up to {size(int(facts['without_relays_nbytes']))}, where workers want the same"),
                ("into a host", f"{facts['seconds_into_a_host']:.3g} s at {self.gbits:g} Gbit/s: no way is faster"),
                ("from the trainers", f"{facts['seconds_from_trainers']:.3g} s from {self.trainer_hosts:g} hosts"),
                (
                    "by chains of relays",
                    f"{facts['seconds_by_chains']:.3g} s in {chains}",
                ),
                ("from one host", f"{facts['seconds_from_one_host']:.3g} s"),
                (
                    "messages",
                    f"{facts['messages_per_host']:,g} with a relay; offers of {size(int(facts['offer_nbytes']))}",
                ),
                ("to decide", f"{facts['seconds_to_decide']:.2g} s of the sender's processor, and three round trips"),
                ("a relay's memory", f"{size(int(facts['relay_nbytes']))} of slots"),
            )
        )


def fleet_of(words: str, **known: float) -> Fleet:
    """A fleet from ``hosts=125,gbits=400``. What is not named is as by default, or as ``known``.

    Raises:
        UsageError: a name is none, a number is not above zero, or there are fewer hosts than one copy needs.
    """
    names = [field.name for field in fields(Fleet)]
    found: dict[str, float] = dict(known)
    for word in filter(None, (word.strip() for word in words.split(","))):
        name, _, number = word.partition("=")
        if name not in names:
            raise UsageError(f"a fleet has no {name!r}; it has {some(names, len(names))}")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = 0.0
        if not 0 < found[name] < math.inf:
            raise UsageError(f"{name} of a fleet is a number above zero, such as hosts=125; found {word!r}")
    fleet = replace(Fleet(), **found)
    if fleet.hosts_per_copy <= fleet.hosts:
        return fleet
    if "hosts_per_copy" in found:
        raise UsageError(
            f"one copy lies on hosts_per_copy={fleet.hosts_per_copy:g} hosts, and there are hosts={fleet.hosts:g}; "
            "name as many hosts, or fewer for a copy"
        )
    return replace(fleet, hosts_per_copy=fleet.hosts)
