"""SGLang's own updater, manager and hooks around a toy model, without its server: versions come whole or not at all."""

import asyncio
import multiprocessing
import types

import pytest
import torch
import torch.distributed
from sglang.srt.managers import io_struct
from sglang.srt.managers import tokenizer_control_mixin as front
from sglang.srt.managers.scheduler_components import weight_updater as managers
from sglang.srt.model_executor.model_runner_components import weight_updater as updaters
from sglang.srt.plugins import load_plugins
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from toy_model import Runner, Toy, checkpoint, equal, expected, loaded, weights_of

import hotweights as hw
import hotweights.engines.sglang.loader as ours


@pytest.fixture(scope="module", autouse=True)
def plugins():
    """As each of SGLang's processes loads them: by our entry point."""
    load_plugins()


def join(patch, store, rank=0, size=1):
    """Stand where SGLang's server would have said what runs: one rank, or several."""
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    group = types.SimpleNamespace(cpu_group=torch.distributed.group.WORLD)
    parallel = types.SimpleNamespace(tp_rank=rank, tp_group=group)
    for module in (updaters, managers, "sglang.srt.runtime_context"):
        owner = __import__(module, fromlist=["x"]) if isinstance(module, str) else module
        patch.setattr(owner, "get_parallel", lambda: parallel)
    patch.setattr(updaters, "get_model", lambda: types.SimpleNamespace(weight_cache_mode="off"))
    patch.setattr(ours, "_get_quantization_config", lambda *_: None)
    patch.setattr(ours, "_initialize_model", lambda *_: Toy())
    patch.setattr(ours.DefaultModelLoader, "_prepare_weights", lambda self, path, *_: (path, [], True))


@pytest.fixture(autouse=True)
def server(monkeypatch):
    join(monkeypatch, torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


class Engine:
    """SGLang's manager in the scheduler, with one runner or two."""

    def __init__(self, *runners, is_idle=True):
        self.runners, self.versions, self.flushes = runners, [], 0
        target, *drafts = [(role, runner) for role, runner in zip(("target", "draft"), runners, strict=False)]

        def flush(**_):
            self.flushes += 1
            return is_idle

        worker = types.SimpleNamespace(
            weight_update_runners=lambda: [target],
            model_runner=target[1],
            deserialize_own_rank=lambda tensors: tensors,
        )
        draft = types.SimpleNamespace(weight_update_runners=lambda: drafts) if drafts else None
        scheduler = types.SimpleNamespace(record_weight_version_change=lambda new_version: self.note(new_version))
        self.manager = managers.SchedulerWeightUpdaterManager(
            tp_worker=worker,
            draft_worker=draft,
            memory_saver_adapter=None,
            flush_cache=flush,
            is_fully_idle=lambda **_: True,
            scheduler=scheduler,
        )

    def note(self, version):
        if version is not None:
            self.versions.append(version)

    def begin(self):
        return self.manager.begin_weight_update(io_struct.BeginWeightUpdateReqInput())

    def send(self, tensors, load_format=None, version=None, flush=True):
        request = types.SimpleNamespace(
            serialized_named_tensors=list(tensors.items()) if load_format is None else tensors,
            load_format=load_format,
            selector="all",
            weight_version=version,
            flush_cache=flush,
            torch_empty_cache=False,
        )
        return self.manager.update_weights_from_tensor(request)

    def end(self):
        return self.manager.end_weight_update(io_struct.EndWeightUpdateReqInput())

    def held(self):
        return [runner.model.held() for runner in self.runners]


def halves(seed):
    tensors = [*weights_of(seed).items()]
    return dict(tensors[:2]), dict(tensors[2:])


def without(name, seed):
    return {key: tensor for key, tensor in weights_of(seed).items() if key != name}


@pytest.fixture
def engine(tmp_path):
    return Engine(loaded(checkpoint(tmp_path / "one", 1)))


def is_version(engine, seed):
    return all(equal(held, expected(seed)) for held in engine.held())


def test_the_load_format(engine, tmp_path):
    from sglang.srt.arg_groups.choices import LOAD_FORMAT_CHOICES
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat

    assert "hotweights" in LOAD_FORMAT_CHOICES
    assert LoadConfig(load_format="auto").load_format is LoadFormat.AUTO
    assert is_version(engine, 1)
    with pytest.raises(hw.UsageError, match="has no options"):
        ours.PlannedLoader(LoadConfig(load_format="hotweights", model_loader_extra_config={"num_threads": 2}))
    with pytest.raises(Exception, match=r"q\.weight|qk\.weight"):
        loaded(checkpoint(tmp_path / "short", 2, without=("q.weight",)))


def test_a_version_in_several_calls(engine):
    first, second = halves(2)
    assert engine.begin().success
    assert engine.send(first, version="two").success
    assert is_version(engine, 1), "nothing is live before the end"
    assert engine.send(second, version="two").success
    assert (engine.versions, engine.flushes) == ([], 0)
    assert engine.end().success
    assert is_version(engine, 2)
    assert (engine.versions, engine.flushes) == (["two"], 1)


def test_a_bucket(engine):
    bucket = FlattenedTensorBucket(named_tensors=list(weights_of(2).items()))
    given = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    engine.begin()
    assert engine.send(given, "flattened_bucket").success
    assert engine.end().success
    assert is_version(engine, 2)


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (lambda: [halves(2)[0]], "out.weight"),
        (lambda: [without("k.weight", 2)], "k.weight"),
        (lambda: [{**weights_of(2), "zz": torch.ones(1)}], "zz"),
        (lambda: [{**weights_of(2), "out.weight": torch.ones(3, 3)}], "out.weight"),
        (lambda: [weights_of(2), {"out.bias": torch.ones(8)}], "out.bias"),
    ],
    ids=["half", "part of a fused one", "unknown", "shape", "twice"],
)
def test_what_is_wrong_is_told_and_nothing_changes(engine, calls, words):
    engine.begin()
    answers = [engine.send(tensors, version="never") for tensors in calls()]
    ended = engine.end()
    assert not ended.success
    assert words in ended.message
    assert all(answer.success or words in answer.message for answer in answers)
    assert is_version(engine, 1)
    assert (engine.versions, engine.flushes) == ([], 0)
    engine.begin()
    assert engine.send(weights_of(3), version="three").success
    assert engine.end().success
    assert is_version(engine, 3)
    assert engine.versions == ["three"]


def test_formats_that_write_into_the_model_are_refused(engine):
    engine.begin()
    assert "leave it away" in engine.send(weights_of(2), "direct").message
    assert not engine.end().success
    request = types.SimpleNamespace(zmq_handles={}, weight_version=None, flush_cache=False, torch_empty_cache=False)
    assert "use update_weights_from_tensor" in engine.manager.update_weights_from_ipc(request).message
    assert is_version(engine, 1)


def test_a_cache_that_cannot_be_flushed(tmp_path):
    engine = Engine(loaded(checkpoint(tmp_path / "one", 1)), is_idle=False)
    engine.begin()
    assert engine.send(weights_of(2), version="two").success
    ended = engine.end()
    assert not ended.success
    assert "the new version is live, and the cache was not flushed" in ended.message
    assert engine.versions == ["two"]
    engine.begin()
    engine.send(weights_of(3), flush=False)
    assert engine.end().success


def test_target_and_draft_take_a_version_together(tmp_path):
    path = checkpoint(tmp_path / "one", 1)
    engine = Engine(loaded(path), loaded(path))
    engine.begin()
    assert engine.send(weights_of(2)).success
    assert engine.end().success
    assert is_version(engine, 2)
    draft = engine.runners[1].model
    draft.qk.quant_method.process_weights_after_loading = lambda layer: 1 / 0
    engine.begin()
    engine.send(weights_of(3))
    ended = engine.end()
    assert not ended.success
    assert "division by zero" in ended.message
    assert equal(engine.held()[0], expected(2))


def test_tensors_that_were_broadcast(engine):
    updater = engine.runners[0].weight_updater
    engine.begin()
    for half in halves(2):
        assert updater.load_weights_from_distributed(list(half.items())) == (True, "Success")
    assert engine.end().success
    assert is_version(engine, 2)


def test_without_a_session_a_call_is_a_version(engine):
    updater = engine.runners[0].weight_updater
    assert updater.update_weights_from_tensor(list(weights_of(2).items())) == (True, "Success")
    assert is_version(engine, 2)
    taken, why = updater.update_weights_from_tensor(list(halves(3)[0].items()))
    assert (taken, "out.weight" in why) == (False, True)
    assert is_version(engine, 2)
    updater.begin_weight_update()
    assert updater.update_weights_from_tensor(list(weights_of(3).items()))[0]
    updater.end_weight_update(run_post_load=False)
    assert is_version(engine, 3)


def test_a_checkpoint(engine, tmp_path):
    runner = engine.runners[0]
    request = types.SimpleNamespace(
        model_path=checkpoint(tmp_path / "two", 2),
        load_format="auto",
        recapture_cuda_graph=False,
        weight_version="two",
        flush_cache=True,
        torch_empty_cache=False,
    )
    assert engine.manager.update_weights_from_disk(request).success
    assert is_version(engine, 2)
    assert (engine.versions, engine.flushes, runner.config.model_path) == (["two"], 1, request.model_path)
    assert runner.fields[0]["model_path"] == request.model_path
    for path in (checkpoint(tmp_path / "short", 3, without=("k.weight",)), str(tmp_path / "none")):
        bad = types.SimpleNamespace(**{**vars(request), "model_path": path, "weight_version": "never"})
        answer = engine.manager.update_weights_from_disk(bad)
        assert not answer.success
        assert "the model is as it was" in answer.message
        assert is_version(engine, 2)
        assert (engine.versions, runner.config.model_path) == (["two"], request.model_path)


def test_models_of_other_formats_are_as_before():
    """SGLang's own words and behaviour: a missing tensor is no error there."""
    model = Toy()
    engine, before = Engine(Runner(model, "x")), model.out.weight.clone()
    engine.begin()
    assert engine.send(halves(2)[0], version="two").success
    assert engine.end().success
    assert engine.versions == ["two"]
    assert torch.equal(model.qk.weight[:8], weights_of(2)["q.weight"])
    assert torch.equal(model.out.weight, before)


class Front(front.TokenizerControlMixin):
    """What SGLang's front end notes; its calls reach nobody."""

    def __init__(self, load_format, answers):
        self.values, self.answers = {"load_format": load_format, "weight_version": "default"}, answers

    def config_value(self, name):
        return self.values[name]

    def record_config_updates(self, _, **values):
        self.values.update(values)

    async def _weight_update_session_call(self, communicator, obj):
        return self.answers.pop(0), ""

    begin_weight_update_communicator = end_weight_update_communicator = None


@pytest.mark.parametrize(
    ("load_format", "is_taken", "between", "after"),
    [
        ("hotweights", True, "default", "two"),
        ("hotweights", False, "default", "default"),
        ("auto", False, "two", "two"),
    ],
)
def test_the_front_ends_version(load_format, is_taken, between, after):
    async def life():
        seen = Front(load_format, [True, is_taken])
        await seen.begin_weight_update(None)
        seen._update_weight_version_if_provided("two")
        names = [seen.values["weight_version"]]
        await seen.end_weight_update(None)
        return [*names, seen.values["weight_version"]]

    assert asyncio.run(life()) == [between, after]


def rank_of_two(rank, path, folder, pipe):
    """One of two ranks of an engine; the second one's processing fails, and then does not."""
    with pytest.MonkeyPatch.context() as patch:
        join(patch, torch.distributed.FileStore(f"{folder}/store", 2), rank, 2)
        engine = Engine(loaded(path))
        method = engine.runners[0].model.qk.quant_method
        process = method.process_weights_after_loading
        if rank == 1:
            method.process_weights_after_loading = lambda layer: 1 / 0
        engine.begin()
        engine.send(weights_of(2))
        ended = engine.end()
        found = [ended.success, ended.message, is_version(engine, 1)]
        method.process_weights_after_loading = process
        engine.begin()
        engine.send(weights_of(2))
        found += [engine.end().success, is_version(engine, 2)]
        pipe.send(found)
        torch.distributed.destroy_process_group()


def test_ranks_take_a_version_together(tmp_path):
    path = checkpoint(tmp_path / "one", 1)
    forked = multiprocessing.get_context("fork")
    torch.distributed.destroy_process_group()
    ends = []
    for rank in range(2):
        ours_, theirs = forked.Pipe()
        process = forked.Process(target=rank_of_two, args=(rank, path, str(tmp_path), theirs))
        process.start()
        ends.append((process, ours_))
    found = [pipe.recv() if pipe.poll(120) else None for _, pipe in ends]
    for process, _ in ends:
        process.join(10)
        process.kill()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for taken, why, is_old, again, is_new in found:
        assert (taken, is_old, again, is_new) == (False, True, True, True)
        assert "rank 1: " in why
        assert "division by zero" in why
