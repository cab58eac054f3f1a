"""The order in which an update pauses, asks, empties caches and resumes: with engines that only say what was called.

``tests/vllm`` does the same with real engines, where vLLM is installed.
"""

import asyncio
from types import SimpleNamespace

import pytest

import hotweights as hw
from hotweights.engines import vllm

LIVE = [{"rank": rank, "version": "new", "error": None} for rank in range(2)]
REFUSED = [
    {"rank": 0, "version": "old", "error": "PlanError: norm: missing"},
    {"rank": 1, "version": "old", "error": "Refused: rank 0: PlanError: norm: missing"},
]
APART = [LIVE[0], REFUSED[1]]


class Calls(list):
    """The calls that an engine got, and what it answers."""

    def __init__(self, answers, *, paused=False, reset=True):
        self.answers, self.paused, self.reset = answers, paused, reset

    def rpc(self, method, args=()):
        self.append(method)
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers

    def empty(self, cache, *given):
        self.append(cache)
        if isinstance(self.reset, Exception):
            raise self.reset
        return self.reset


def offline(calls):
    """As ``vllm.LLM``, with its engine in another process."""
    engine = SimpleNamespace(
        engine_core=object(),
        is_sleeping=lambda: calls.paused,
        reset_encoder_cache=lambda: calls.empty("encoder"),
        set_weight_version=lambda name: calls.append(f"named {name}"),
    )
    return SimpleNamespace(
        llm_engine=engine,
        collective_rpc=calls.rpc,
        sleep=lambda level, mode: calls.append(f"pause {mode}"),
        wake_up=lambda tags: calls.append("resume"),
        reset_prefix_cache=lambda *given: calls.empty(f"prefix {given}"),
        reset_mm_cache=lambda: calls.empty("multimodal"),
    )


def serving(calls):
    """As ``AsyncLLM``."""

    def later(act):
        async def call(*given, **options):
            return act(*given, **options)

        return call

    return SimpleNamespace(
        collective_rpc=later(calls.rpc),
        is_paused=later(lambda: calls.paused),
        pause_generation=later(lambda mode, clear_cache: calls.append(f"pause {mode}")),
        resume_generation=later(lambda: calls.append("resume")),
        reset_prefix_cache=later(lambda *given: calls.empty(f"prefix {given}")),
        reset_mm_cache=later(lambda: calls.empty("multimodal")),
        reset_encoder_cache=later(lambda: calls.empty("encoder")),
        update_weight_version=later(lambda name: calls.append(f"named {name}")),
    )


@pytest.fixture(params=["offline", "serving"])
def update(request):
    """Updates an engine of either kind."""
    if request.param == "offline":
        return lambda calls, **options: vllm.update(offline(calls), "there", **options)
    return lambda calls, **options: asyncio.run(vllm.update_async(serving(calls), "there", **options))


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_caches_are_emptied_between_the_commit_and_the_next_step(update, mode):
    calls = Calls(LIVE)
    outcome = update(calls, mode=mode)
    caches = [f"prefix ({mode == 'keep'}, True)", "multimodal", "encoder"]
    assert calls == [f"pause {mode}", "hotweights_update", *caches, "named new", "resume"]
    assert outcome == vllm.Outcome("new", tuple(LIVE), ("prefix", "multimodal", "encoder"))


def test_an_engine_that_was_paused_stays_so(update):
    calls = Calls(LIVE, paused=True)
    update(calls)
    assert "hotweights_update" in calls
    assert "resume" not in calls


def test_a_refusal_names_the_rank_and_leaves_the_caches(update):
    calls = Calls(REFUSED)
    with pytest.raises(
        hw.UpdateAborted, match="'old' is live on all ranks; rank 0: PlanError: norm: missing"
    ) as caught:
        update(calls)
    assert "Refused" not in str(caught.value), "rank 1 only repeats what it heard"
    assert calls == ["pause wait", "hotweights_update", "resume"]


def test_ranks_that_differ_are_named_and_stay_paused(update):
    calls = Calls(APART)
    with pytest.raises(vllm.RanksDiffer, match="the engine stays paused") as caught:
        update(calls)
    assert caught.value.problems == (
        "rank 0 has 'new'",
        "rank 1 has 'old': Refused: rank 0: PlanError: norm: missing",
    )
    assert calls == ["pause wait", "hotweights_update"]


@pytest.mark.parametrize(
    ("reset", "words"), [(False, "refused, because requests use it"), (OSError("gone"), "OSError('gone')")]
)
def test_a_cache_that_stays_full_keeps_the_engine_paused(update, reset, words):
    calls = Calls(LIVE, reset=reset)
    with pytest.raises(hw.CommitHookError, match="'new' is live") as caught:
        update(calls)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["encoder", "multimodal", "prefix"]
    assert all(words in problem for problem in caught.value.problems)
    assert calls[-1] == "encoder"


def test_an_engine_without_our_worker(update):
    calls = Calls(AttributeError("'Worker' object has no attribute 'hotweights_update'"))
    with pytest.raises(hw.UsageError, match="worker_extension_cls"):
        update(calls)
    assert calls[-1] == "resume"


def test_an_engine_that_is_lost_stays_paused(update):
    calls = Calls(ConnectionError("the engine is dead"))
    with pytest.raises(ConnectionError, match="dead"):
        update(calls)
    assert calls == ["pause wait", "hotweights_update"]


def test_an_unknown_mode_pauses_nothing(update):
    calls = Calls(LIVE)
    with pytest.raises(hw.UnknownName, match="known are: abort, keep, wait"):
        update(calls, mode="later")
    assert not calls


def test_status():
    assert vllm.status(offline(Calls(LIVE))) == LIVE
    assert asyncio.run(vllm.status_async(serving(Calls(LIVE)))) == LIVE
    with pytest.raises(hw.UsageError, match="worker_extension_cls"):
        vllm.status(offline(Calls(NotImplementedError("hotweights_status is not implemented"))))
