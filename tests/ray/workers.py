"""Workers that are actors of Ray, as users write them: the address is all that they know."""

import os

import torch

import hotweights as hw


def model_of(value):
    """A model whose weights are all ``value``."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 64))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model


class Worker:
    def __init__(self, address, name=""):
        self.live = hw.LiveModel(model_of(0.0))
        self.receiver = hw.Receiver(address, name=name, timeout=60, offer_timeout=120)

    def take(self):
        """Take the next version. Returns what is live then, and what went wrong."""
        said = ""
        try:
            if self.live.version is None:
                self.live.load(self.receiver)
            else:
                self.live.update(self.receiver)
        except hw.HotweightsError as error:
            said = f"{type(error).__name__}: {error}"
        return (*self.state(), said)

    def state(self):
        """The version, and the one value that all weights have."""
        values = {value for weight in self.live.model.parameters() for value in weight.detach().unique().tolist()}
        return self.live.version, values.pop() if len(values) == 1 else values

    def inside(self):
        """Where bytes come through, and what this process has of keys on a disk."""
        return repr(self.receiver._connection._endpoint._inner.address), os.getpid()

    def close(self):
        self.receiver.close()


class Trainer:
    def __init__(self, address, **options):
        self.sender = hw.Sender(address, **options)

    def send(self, value, **options):
        """Send a version. Returns who took it, bytes over the network, and what went wrong."""
        try:
            report = self.sender.send(model_of(float(value)), version=value, **options)
        except hw.HotweightsError as error:
            return (), 0, f"{type(error).__name__}: {error}"
        return report.committed, report.network_nbytes, ""

    def address(self):
        return self.sender.address

    def close(self):
        self.sender.close()
