"""vLLM's weight transfer with our backend: a trainer made by vLLM's factory gives versions to engines, all or none."""

import contextlib
import gc
import os
import threading
from types import SimpleNamespace

import pytest
from drive import Talker
from trainers import BACKEND, DUMMY, caught, failing, narrower, trained, trainer_of, with_biases, without_last

NARROWER = [
    "model.embed_tokens.weight",
    *(f"model.layers.1.{part}.weight" for part in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")),
    "model.norm.weight",
]


def rss():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def round_of_refits(talker: Talker, paths):
    """A tour through one engine; each entry is what happened and what the engine held after it."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    from hotweights.engines import vllm as engine

    llm = talker.llm
    models = {weights: trained(paths[weights]) for weights in "AB"}
    found = {}

    def note(name, what):
        (status,) = engine.status(llm, digest=False)
        held = status["version"], llm.get_weight_version(), status["session_open"], llm.llm_engine.is_sleeping()
        found[name] = what, talker.tokens(), held

    note("dummy", None)
    trainer = trainer_of(engine.LLMClient(llm), ModuleSource(models["B"]))
    note("B", trainer.send_weights().version)
    for name, source in (("short", without_last), ("failing", failing)):
        trainer.source = source(models["A"])
        note(name, caught(lambda name=name: trainer.send_weights(name)))
    for name in NARROWER:  # Each is refused by other code of vLLM's, which names no tensor.
        trainer.source = narrower(models["A"], name)
        note(name, caught(lambda: trainer.send_weights("narrower")))
    trainer.source = with_biases(models["A"])
    report = trainer.send_weights("step-7")
    found["unwanted"] = report.unwanted
    note("A", report.version)

    # A trainer that died between the start and the finish.
    llm.start_weight_update()
    trainer.shutdown()
    note("trainer gone", caught(lambda: llm.update_weights({"update_info": {"version": "never"}})))
    found["told"] = engine.status(llm, digest=False)[0]["refused"]
    trainer = trainer_of(engine.LLMClient(llm), ModuleSource(models["B"]), collect=True)
    note("the next trainer", trainer.send_weights("step-8").version)
    llm.start_weight_update()
    note("closed by hand", llm.collective_rpc("hotweights_close_session")[0]["session_open"])
    llm.collective_rpc("hotweights_close_session")  # Nothing to close.

    # What is wrong is told, and the engine goes on.
    llm.init_weight_transfer_engine({"init_info": {"port": 7}})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"versions": 7}})
    found["wrong calls"] = engine.status(llm, digest=False)[0]["refused"]
    llm.update_weights({"update_info": "no mapping"})
    found["no mapping"] = engine.status(llm, digest=False)[0]["refused"]
    llm.init_weight_transfer_engine({"init_info": "no mapping"})
    llm.update_weights({"update_info": {}})
    found["no trainer"] = engine.status(llm, digest=False)[0]["refused"]
    llm.finish_weight_update()
    calls = [("update", ()), ("update", (7,)), ("status", (False, 1)), ("close_session", (1,))]
    found["wrong arguments"] = [llm.collective_rpc(f"hotweights_{name}", args=args)[0] for name, args in calls]
    trainer.shutdown()
    trainer = trainer_of(engine.LLMClient(llm), ModuleSource(models["A"]))
    asleep = SimpleNamespace(pointer_to_data={0: SimpleNamespace(tag="weights", is_asleep=True)})
    with allocating(asleep):
        note("asleep", caught(trainer.send_weights))
        found["status asleep"] = engine.status(llm)[0]
    found["without pausing"] = trainer_of(engine.LLMClient(llm, mode=None), ModuleSource(models["A"])).send_weights(9)
    found["without pausing"] = found["without pausing"].version
    note("slow", slow(llm, models["B"]))
    note("stuck", stuck(llm, models["A"]))
    trainer.source = None
    found["no source"] = caught(lambda: trainer_of(engine.LLMClient(llm), None))
    found["a store"] = caught(lambda: trainer_of(engine.LLMClient(llm), ModuleSource(models["A"]), address="s3://b/c"))
    found["receivers"] = caught(lambda: trainer_of(llm, ModuleSource(models["A"])))
    found["too many"] = caught(lambda: trainer_of(engine.LLMClient(llm), ModuleSource(models["A"]), receivers=2))

    # Speculative decoding with a model of its own, which does not run here.
    config = llm.llm_engine.model_executor.driver_worker.worker.vllm_config
    config.speculative_config = SimpleNamespace(method="mtp")
    found["drafts"] = engine.update(llm, paths["B"]).ranks[0]["report"]["warnings"]
    config.speculative_config = None

    # Twenty refits; the first few fill caches of plans and of memory allocators.
    trainer = trainer_of(engine.LLMClient(llm), ModuleSource(models["A"]))
    sizes = []
    for number in range(25):
        trainer.source = ModuleSource(models["AB"[number % 2]])
        trainer.send_weights(number)
        sizes.append(rss())
    found["grown"] = sizes[-1] - sizes[4]  # A version has 3.5 MB.
    note("last", None)
    trainer.shutdown()
    return found


def slow(llm, model):
    """Whether the engine stands while the source is read: by default, and when all is collected before."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    from hotweights.engines import vllm as engine

    class Looking(ModuleSource):
        def __iter__(self):
            for pair in super().__iter__():
                stands.add(llm.llm_engine.is_sleeping())
                yield pair

    found = []
    for collect in (False, True):
        stands = set()
        trainer = trainer_of(engine.LLMClient(llm), Looking(model), collect=collect)
        trainer.send_weights(f"collect={collect}")
        trainer.shutdown()
        found.append(stands)
    return found


def stuck(llm, model):
    """A source that does not go on before the engine has given up waiting: it must, and nothing is lost."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    from hotweights.engines import vllm as engine

    gave_up = threading.Event()

    class Noting(engine.LLMClient):
        def update_weights(self, update_info):
            super().update_weights(update_info)
            gave_up.set()

    class Stuck(ModuleSource):
        def __iter__(self):
            for number, pair in enumerate(super().__iter__()):
                if number == 5:
                    assert gave_up.wait(300)
                yield pair

    trainer = trainer_of(Noting(llm), Stuck(model), timeout=1)
    failure = caught(lambda: trainer.send_weights("never"))
    trainer.shutdown()
    return failure


@contextlib.contextmanager
def allocating(allocator):
    """Inside, vLLM's allocator for sleep mode is another: it does not run on a CPU."""
    from vllm.device_allocator.cumem import CuMemAllocator

    CuMemAllocator.instance, before = allocator, CuMemAllocator.instance
    try:
        yield
    finally:
        CuMemAllocator.instance = before


def test_refits_of_an_engine_in_this_process(zoo):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    said = {weights: zoo.fresh("llama", weights) for weights in "AB"}
    found = zoo.run(round_of_refits, zoo.checkpoint("llama", "A"), paths, options={**BACKEND, **DUMMY})
    _, tokens, held = found["dummy"]
    assert tokens not in said.values()
    assert held == ("dummy", "default", False, False)
    assert found["B"] == (1, said["B"], (1, "1", False, False))
    narrow = [(name, f"{name}: ") for name in NARROWER]
    for name, words in (("short", "lm_head.weight: missing"), ("failing", "the gather failed"), *narrow):
        assert words in found[name][0]
        assert found[name][1:] == (said["B"], (1, "1", False, False))
    assert 'allow_missing="lm_head.weight". It is said in the first load' in found["short"][0]
    assert "matches no tensor" not in found["short"][0], "of what it allows by itself nothing is said"
    assert found["A"] == ("step-7", said["A"], ("step-7", "step-7", False, False))
    assert found["unwanted"] == ("lm_head.bias", "model.layers.0.self_attn.q_proj.bias"), "vLLM's code passes over them"
    assert found["trainer gone"] == ("nothing was raised", said["A"], ("step-7", "step-7", True, False))
    assert "no sender is at" in found["told"]
    assert found["the next trainer"] == ("step-8", said["B"], ("step-8", "step-8", False, False))
    assert found["closed by hand"] == (False, said["B"], ("step-8", "step-8", False, False))
    assert "Invalid update_info" in found["wrong calls"]
    assert "must be a mapping" in found["no mapping"]
    assert "no trainer" in found["no trainer"]
    words = [answer["error"] for answer in found["wrong arguments"]]
    assert ["argument" in each for each in words] == [True, False, True, True]
    assert words[1] == "UsageError: a source is a path, or the address of a sender; found 7"
    assert {answer["version"] for answer in found["wrong arguments"]} == {"step-8"}
    assert "this engine sleeps" in found["asleep"][0]
    assert found["asleep"][1:] == (said["B"], ("step-8", "step-8", False, False))
    assert (found["status asleep"]["digest"], found["status asleep"]["version"]) == (None, "step-8")
    assert found["without pausing"] == 9
    assert found["slow"] == ([{True}, {False}], said["B"], ("collect=True", "collect=True", False, False))
    assert "TransferAborted" in found["stuck"][0]
    assert found["stuck"][1:] == (said["B"], ("collect=True", "collect=True", False, False))
    assert "a trainer needs a source" in found["no source"]
    assert "engines connect to unix:PATH or tcps://HOST:PORT" in found["a store"]
    assert "receivers= is missing" in found["receivers"]
    assert "1 of 2 workers connected" in found["too many"]
    assert "the draft model keeps its weights" in found["drafts"][0]
    assert found["last"][1:] == (said["A"], (24, "24", False, False))
    assert found["grown"] < 32 << 20


def fused_in_memory(talker: Talker, path, address):
    """By the trainer, and by a sender of one's own."""
    import threading

    import hotweights as hw
    from hotweights.engines import vllm as engine

    model = trained(path)
    assert any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    trainer = trainer_of(engine.LLMClient(talker.llm), model)
    found = [(trainer.send_weights("by the trainer").version, talker.tokens())]
    trainer.shutdown()
    with hw.Sender(address, timeout=60) as sender:
        sending = threading.Thread(target=sender.send, args=(model,), kwargs={"version": "by hand"})
        sending.start()
        found.append((engine.update(talker.llm, address).version, talker.tokens()))
        sending.join()
    return found


def test_a_model_that_has_other_names_in_memory(zoo, tmp_path):
    """vLLM's DeepSeek takes only what is saved; transformers keeps the experts of a layer as one tensor."""
    said = zoo.fresh("deepseek-v3", "B")
    path = zoo.checkpoint("deepseek-v3", "A")
    given = str(zoo.checkpoint("deepseek-v3", "B")), f"unix:{tmp_path}/t"
    found = zoo.run(fused_in_memory, path, *given, options={**BACKEND, **DUMMY})
    assert found == [("by the trainer", said), ("by hand", said)]


def not_ours(talker: Talker):
    """Never called: the engine does not start."""


def test_a_model_of_another_load_format_is_refused_at_the_start(zoo):
    options = {**BACKEND, "load_format": "auto"}
    with pytest.raises(AssertionError, match="start the engine with --load-format hotweights"):
        zoo.run(not_ours, zoo.checkpoint("llama", "A"), options=options)
