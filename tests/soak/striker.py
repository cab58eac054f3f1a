"""Striker: a process that sends its parent real signals at random moments, until somebody ends it."""

import os
import random
import signal
import sys
import time

_PAUSES = (0.0003, 0.0006, 0.001, 0.003)  # mean seconds between two signals; each for a while, so that ends are met too


def main(parent, seed):
    draw = random.Random(seed)
    while True:
        pause = draw.choice(_PAUSES)
        for _ in range(100):
            time.sleep(draw.expovariate(1 / pause))
            if os.getppid() != parent:
                return
            os.kill(parent, draw.choice((signal.SIGINT, signal.SIGINT, signal.SIGUSR1)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit())  # Ctrl-C in a terminal: the parent sees our end.
    main(int(sys.argv[1]), sys.argv[2])
