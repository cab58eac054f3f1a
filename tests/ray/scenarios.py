"""What a driver does on a cluster of three hosts, a scenario by name. Prints what it has found as JSON."""

import json
import os
import signal
import sys
import time

import ray
from cluster import kill_host, named
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from workers import Worker, model_of

import hotweights as hw
from hotweights.engines.ray import start_relays, whereabouts
from hotweights.transfer.channel import Channel
from hotweights.transfer.messages import End, Filled, Offer

ABOUT = json.loads(sys.argv[2])
ADDRESS = "ray:job"


def workers_on(addresses):
    """Actors, each on the host of an address; they know nothing but the sender's name."""
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    kind = ray.remote(num_cpus=1)(Worker)
    workers = [
        kind.options(scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[address], soft=False)).remote(
            ADDRESS, f"rank{number}"
        )
        for number, address in enumerate(addresses)
    ]
    ray.get([worker.state.remote() for worker in workers])  # Each has imported torch.
    return workers


def sent(sender, version, workers, **options):
    """Send a version. Returns how many took it, bytes over the network, what went wrong, and what each has then."""
    taking = [worker.take.remote() for worker in workers]
    try:
        report = sender.send(model_of(float(version)), version=version, show_progress=False, **options)
        said = (len(report.committed), report.network_nbytes, "")
    except hw.HotweightsError as error:
        said = (0, 0, f"{type(error).__name__}: {error}")
    return [*said, [state_of(each) for each in taking]]


def state_of(answer):
    try:
        return ray.get(answer, timeout=180)
    except ray.exceptions.RayError as error:
        return type(error).__name__


def relayed():
    """Versions come through a relay on each other host; it dies, and Ray starts it again. The sender is replaced."""
    one, two, here = ABOUT["hosts"]
    workers = workers_on([one, one, two, two, here])
    found = {"nbytes": sum(weight.nbytes for weight in model_of(0.0).parameters())}
    with hw.Sender(ADDRESS, receivers=5, timeout=120) as sender:
        found["first"] = sent(sender, 1, workers)
        found["connected"] = sorted(sender.connected)
        found["through"] = [ray.get(worker.inside.remote())[0] for worker in workers]
        about = whereabouts(ADDRESS)
        found["whereabouts"] = [about.process, about.network, sorted(about.relays)]
        relays = named(ABOUT["hosts"][one], "ray::RayRelay")
        found["relays"] = [len(named(host, "ray::RayRelay")) for host in ABOUT["hosts"].values()]
        for pid in relays:
            os.kill(pid, signal.SIGKILL)
        found["lost"] = sent(sender, 2, [])[2]  # As after any loss: too few are left.
        found["second"] = sent(sender, 2, workers)
        try:
            hw.Sender(ADDRESS)
        except hw.AddressTaken as error:
            found["taken"] = str(error)
    until = time.monotonic() + 120  # Ray ends a process some time after it has said so.
    while any(named(host, "ray::RayRelay") for host in ABOUT["hosts"].values()) and time.monotonic() < until:
        time.sleep(0.2)
    found["relays after"] = [len(named(host, "ray::RayRelay")) for host in ABOUT["hosts"].values()]
    with hw.Sender(ADDRESS, receivers=5, timeout=120) as sender:
        found["started"] = len(start_relays(ADDRESS, timeout=180, keep="1GB"))
        found["third"] = sent(sender, 3, workers)
        found["late"] = [state_of(worker.take.remote()) for worker in workers_on([one])]
    return found


def killed():
    """A host with two of four workers dies at a message of the second version; the third goes to the others."""
    one, two, _ = ABOUT["hosts"]
    workers, found = workers_on([one, one, two, two]), {}
    at = {"offer": Offer, "filled": Filled, "end": End}[ABOUT.get("at", "filled")]
    say, dead = Channel.send, []

    def killing(channel, message, **options):
        if type(message) is at and not dead:
            dead.append(kill_host(ABOUT["hosts"][two]))
        say(channel, message, **options)

    with hw.Sender(ADDRESS, receivers=4, timeout=60) as sender:
        start_relays(ADDRESS, timeout=180)
        found["first"] = sent(sender, 1, workers)
        Channel.send = killing
        began = time.monotonic()
        found["second"] = sent(sender, 2, workers)
        found["seconds"] = time.monotonic() - began
        found["killed"] = sum(dead)
        Channel.send = say
        found["third"] = sent(sender, 3, workers[:2], receivers=2)
    return found


ray.init(ABOUT["head"], _node_ip_address=ABOUT["address"], log_to_driver=False, logging_level="ERROR")
result = {"relayed": relayed, "killed": killed}[sys.argv[1]]()
ray.shutdown()
print(json.dumps(result))
