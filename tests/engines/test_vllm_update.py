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


class Said(list):
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


def offline(said):
    """As ``vllm.LLM``, with its engine in another process."""
    engine = SimpleNamespace(
        engine_core=object(),
        is_sleeping=lambda: said.paused,
        reset_encoder_cache=lambda: said.empty("encoder"),
        set_weight_version=lambda name: said.append(f"named {name}"),
    )
    return SimpleNamespace(
        llm_engine=engine,
        collective_rpc=said.rpc,
        sleep=lambda level, mode: said.append(f"pause {mode}"),
        wake_up=lambda tags: said.append("resume"),
        reset_prefix_cache=lambda *given: said.empty(f"prefix {given}"),
        reset_mm_cache=lambda: said.empty("multimodal"),
    )


def serving(said):
    """As ``AsyncLLM``."""

    def later(act):
        async def call(*given, **options):
            return act(*given, **options)

        return call

    return SimpleNamespace(
        collective_rpc=later(said.rpc),
        is_paused=later(lambda: said.paused),
        pause_generation=later(lambda mode, clear_cache: said.append(f"pause {mode}")),
        resume_generation=later(lambda: said.append("resume")),
        reset_prefix_cache=later(lambda *given: said.empty(f"prefix {given}")),
        reset_mm_cache=later(lambda: said.empty("multimodal")),
        reset_encoder_cache=later(lambda: said.empty("encoder")),
        update_weight_version=later(lambda name: said.append(f"named {name}")),
    )


@pytest.fixture(params=["offline", "serving"])
def update(request):
    """Updates an engine of either kind."""
    if request.param == "offline":
        return lambda said, **options: vllm.update(offline(said), "there", **options)
    return lambda said, **options: asyncio.run(vllm.update_async(serving(said), "there", **options))


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_caches_are_emptied_between_the_commit_and_the_next_step(update, mode):
    said = Said(LIVE)
    outcome = update(said, mode=mode)
    caches = [f"prefix ({mode == 'keep'}, True)", "multimodal", "encoder"]
    assert said == [f"pause {mode}", "hotweights_update", *caches, "named new", "resume"]
    assert outcome == vllm.Outcome("new", tuple(LIVE), ("prefix", "multimodal", "encoder"))


def test_an_engine_that_was_paused_stays_so(update):
    said = Said(LIVE, paused=True)
    update(said)
    assert "hotweights_update" in said
    assert "resume" not in said


def test_a_refusal_names_the_rank_and_leaves_the_caches(update):
    said = Said(REFUSED)
    with pytest.raises(
        hw.UpdateAborted, match="'old' is live on all ranks; rank 0: PlanError: norm: missing"
    ) as caught:
        update(said)
    assert "Refused" not in str(caught.value), "rank 1 only repeats what it heard"
    assert said == ["pause wait", "hotweights_update", "resume"]


def test_ranks_that_differ_are_named_and_stay_paused(update):
    said = Said(APART)
    with pytest.raises(vllm.RanksDiffer, match="the engine stays paused") as caught:
        update(said)
    assert caught.value.problems == (
        "rank 0 has 'new'",
        "rank 1 has 'old': Refused: rank 0: PlanError: norm: missing",
    )
    assert said == ["pause wait", "hotweights_update"]


@pytest.mark.parametrize(
    ("reset", "words"), [(False, "refused, because requests use it"), (OSError("gone"), "OSError('gone')")]
)
def test_a_cache_that_stays_full_keeps_the_engine_paused(update, reset, words):
    said = Said(LIVE, reset=reset)
    with pytest.raises(hw.CommitHookError, match="'new' is live") as caught:
        update(said)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["encoder", "multimodal", "prefix"]
    assert all(words in problem for problem in caught.value.problems)
    assert said[-1] == "encoder"


def test_an_engine_without_our_worker(update):
    said = Said(AttributeError("'Worker' object has no attribute 'hotweights_update'"))
    with pytest.raises(hw.UsageError, match="worker_extension_cls"):
        update(said)
    assert said[-1] == "resume"


def test_an_engine_that_is_lost_stays_paused(update):
    said = Said(ConnectionError("the engine is dead"))
    with pytest.raises(ConnectionError, match="dead"):
        update(said)
    assert said == ["pause wait", "hotweights_update"]


def test_an_unknown_mode_pauses_nothing(update):
    said = Said(LIVE)
    with pytest.raises(hw.UnknownName, match="known are: abort, keep, wait"):
        update(said, mode="later")
    assert not said


def test_status():
    assert vllm.status(offline(Said(LIVE))) == LIVE
    assert asyncio.run(vllm.status_async(serving(Said(LIVE)))) == LIVE
    with pytest.raises(hw.UsageError, match="worker_extension_cls"):
        vllm.status(offline(Said(NotImplementedError("hotweights_status is not implemented"))))
