"""Trainers on other hosts: addresses on the network, keys, and a relay. All of it on loopback."""

import os
import socket
import threading

from drive import Talker
from trainers import BACKEND, DUMMY, caught, trained, trainer_of


def across(talker: Talker, paths, folder):
    """A tour; each entry is what happened and what the engine said after it."""
    import hotweights as hw
    from hotweights.engines import vllm as engine
    from hotweights.transfer import Relay
    from hotweights.transfer.keys import make_keys

    llm, found = talker.llm, {}
    keys = {name: f"{folder}/{name}" for name in ("job", "other")}
    for directory in keys.values():
        make_keys(directory, ["127.0.0.1"])
    models = {weights: trained(paths[weights]) for weights in "AB"}
    config = talker.llm.llm_engine.model_executor.driver_worker.worker.vllm_config.load_config

    def refit(weights, version, client=None, **options):
        trainer = trainer_of(
            engine.LLMClient(llm) if client is None else client,
            models[weights],
            **{"address": "tcps://127.0.0.1:0", "keys": keys["job"], **options},
        )
        report = trainer.send_weights(version)
        trainer.shutdown()
        return report.version, report.network_nbytes > 0, talker.tokens()

    found["the trainer's keys"] = refit("B", "one")
    os.environ |= {"HOTWEIGHTS_ADDRESS": "tcps://127.0.0.1:0", "HOTWEIGHTS_KEYS": keys["job"]}
    found["its environment"] = refit("A", "one and a half", address="env:", keys=None)
    del os.environ["HOTWEIGHTS_ADDRESS"], os.environ["HOTWEIGHTS_KEYS"]  # The engine has others.
    llm.start_weight_update()  # By a trainer that died.
    found["no keys"] = refit("A", "two", keys=None)
    config.model_loader_extra_config = {**DUMMY["model_loader_extra_config"], "keys": keys["job"]}
    found["other keys"] = caught(lambda: refit("B", "never", keys=keys["other"])), talker.tokens()
    found["told"] = engine.status(llm, digest=False)[0]["refused"]
    found["the engine's keys"] = refit("B", "three", keys=keys["job"])
    found["on this host"] = refit("A", "four", address=[f"unix:{folder}/socket", "tcps://127.0.0.1:0"])

    class Relayed(engine.LLMClient):
        """Of an engine whose host has a relay."""

        def init_weight_transfer_engine(self, init_info):
            addresses = [f"unix:{folder}/relay", init_info["address"]]
            super().init_weight_transfer_engine({**init_info, "address": addresses})

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcps://127.0.0.1:{free.getsockname()[1]}"
    with Relay(address, f"unix:{folder}/relay", keys=keys["job"]) as relay:
        running = threading.Thread(target=relay.run)
        running.start()
        try:
            found["relay"] = refit("B", "five", Relayed(llm), address=address)
        finally:
            relay.close()
            running.join()

    config.model_loader_extra_config = {}
    with hw.Sender("tcps://127.0.0.1:0", keys=keys["job"], timeout=60) as sender:
        sending = threading.Thread(target=sender.send, args=(models["A"],), kwargs={"version": "six"})
        sending.start()
        found["update"] = engine.update(llm, sender.address, keys=keys["job"]).version, talker.tokens()
        sending.join()
    found["where are keys"] = caught(lambda: engine.update(llm, "tcps://192.0.2.1:7600"))
    llm.init_weight_transfer_engine({"init_info": {"address": "tcps://192.0.2.1:7600"}})
    found["where are they"] = engine.status(llm, digest=False)[0]["refused"]
    return found


def test_trainers_on_other_hosts(zoo, tmp_path):
    paths = {weights: str(zoo.checkpoint("llama", weights)) for weights in "AB"}
    said = {weights: zoo.fresh("llama", weights) for weights in "AB"}
    found = zoo.run(across, zoo.checkpoint("llama", "A"), paths, str(tmp_path), options={**BACKEND, **DUMMY})
    assert found["the trainer's keys"] == ("one", True, said["B"])
    assert found["its environment"] == ("one and a half", True, said["A"])
    assert found["no keys"] == ("two", True, said["A"])
    assert "0 of 1 workers connected" in found["other keys"][0]
    assert found["other keys"][1] == said["A"]
    assert "both ends need keys= of one job" in found["told"]
    assert found["the engine's keys"] == ("three", True, said["B"])
    assert found["on this host"] == ("four", False, said["A"])
    assert found["relay"] == ("five", True, said["B"])
    assert found["update"] == ("six", said["A"])
    for words in (found["where are keys"], found["where are they"]):
        assert "can be reached from other hosts" in words
        assert '--model-loader-extra-config \'{"keys": "DIR"}\'' in words
