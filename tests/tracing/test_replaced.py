"""What is replaced while a model is traced is as it was afterwards, and for other threads meanwhile too."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ends import Thread
from torch import nn

import hotweights as hw

WAIT = 30


class Stopping(nn.Module):
    """Its loading code stops in the midst of it until it is told to go on."""

    def __init__(self, act=lambda: None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.act, self.inside, self.go_on = act, threading.Event(), threading.Event()

    def load_weights(self, pairs):
        for _, tensor in pairs:
            self.inside.set()
            assert self.go_on.wait(WAIT)
            self.act()
            self.weight.data.copy_(tensor)


def traced(model):
    return hw.trace(model, hw.open({"weight": torch.ones(2)}).manifest)


def functions():
    return threading.Thread.start, ThreadPoolExecutor.submit, torch.utils.swap_tensors


@pytest.mark.parametrize("first", [0, 1])
def test_two_traces_that_overlap_put_everything_back(first):
    """Each for itself, the one that ends last puts back what it had found: what the other one had put there."""
    before, models = functions(), [Stopping(), Stopping()]
    threads = []
    for model in models:
        threads.append(Thread(traced, model))
        assert model.inside.wait(WAIT)
    for number in (first, 1 - first):
        models[number].go_on.set()
        threads[number].result()
    assert functions() == before


def test_a_swap_in_a_thread_that_traces_nothing_is_a_swap():
    model = Stopping()
    thread = Thread(traced, model)
    assert model.inside.wait(WAIT)
    one, other = torch.zeros(1), torch.ones(1)
    torch.utils.swap_tensors(one, other)
    assert (one, other) == (1, 0)
    model.go_on.set()
    assert not thread.result().graph_breaks


def test_a_swap_in_a_thread_of_the_loading_code_is_a_graph_break():
    def swap():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.utils.swap_tensors, model.weight, nn.Parameter(torch.ones(2))).result()

    model = Stopping(swap)
    model.go_on.set()
    assert "swap_tensors" in str(traced(model).graph_breaks)
