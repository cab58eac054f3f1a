"""Tally: what a soak did, and each fault that it saw."""

from __future__ import annotations

import collections
import re
import threading
import traceback

_SHOWN = 12  # lines of a traceback, the innermost ones
_ALIKE = 3  # faults that differ in their numbers only are printed so often


class Tally:
    """Counts by part; faults are printed as they come. Any thread may add."""

    def __init__(self):
        self.counts = collections.defaultdict(collections.Counter)
        self.faults = []
        self._kinds = collections.Counter()
        self.place = "start"  # the part and the turn that run; what a fault is named by
        self._lock = threading.Lock()

    def add(self, what, number=1):
        with self._lock:
            self.counts[self.place.partition(" ")[0]][what] += number

    def fault(self, text, error=None):
        if error is not None:
            lines = "".join(traceback.format_exception(error)).splitlines()[-_SHOWN:]
            text = "\n    ".join([f"{text}: {type(error).__name__}", *lines])
        self.add("faults")
        self.faults.append(f"{self.place}: {text}")
        kind = re.sub(r"\d+", "", text.partition("interrupted at")[0])
        self._kinds[kind] += 1
        if self._kinds[kind] <= _ALIKE:
            print(f"FAULT {self.faults[-1]}", flush=True)

    def line(self):
        """All counts in one line."""
        parts = (f"{part}: {', '.join(f'{n:,} {what}' for what, n in c.items())}" for part, c in self.counts.items())
        return "; ".join(parts)

    def table(self):
        rows = [(part, what, f"{number:,}") for part, c in self.counts.items() for what, number in sorted(c.items())]
        return "\n".join(f"{part:<10} {what:<28} {number:>12}" for part, what, number in rows)
