"""The machine's fingerprint: what names it never moves, what moves never names it."""

from __future__ import annotations

import json
import os

from metabench import environment

WORKER = {"torch": "2.9.0+cpu", "gpu": None, "threads": 2}


def test_the_name_is_stable_and_does_not_depend_on_the_order():
    facts = environment.stable(WORKER)
    assert environment.name(facts) == environment.name(environment.stable(dict(reversed(WORKER.items()))))
    assert environment.name(facts) == environment.name(dict(reversed(facts.items())))


def test_every_stable_fact_names_the_machine():
    facts = environment.stable(WORKER)
    names = {environment.name({**facts, key: "other"}) for key in facts}
    assert len(names | {environment.name(facts)}) == len(facts) + 1


def test_readings_are_apart_from_what_names_the_machine():
    assert not environment.volatile().keys() & environment.stable(WORKER).keys()
    json.dumps([environment.volatile(), environment.stable(WORKER)])


def test_a_worker_gets_our_environment_the_allocators_and_its_threads(monkeypatch):
    monkeypatch.setenv("METABENCH_DATA", "somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    given = environment.worker_environment(3)
    assert given["METABENCH_DATA"] == "somewhere"
    assert (given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"]) == ("3", "3")
    assert given["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == "64"


def test_cores_are_those_this_process_may_use():
    if hasattr(os, "sched_getaffinity"):
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert environment.cores() == 1
        finally:
            os.sched_setaffinity(0, before)
    assert environment.cores() >= 1
