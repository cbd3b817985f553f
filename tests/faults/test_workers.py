"""Workers that are killed while they load, wait and compute."""

from __future__ import annotations

import os
import random
import signal
import time

from tests.conftest import StartDaemon
from tests.daemon import CHELSEA, COFFEE, Daemon, wait_until
from tests.faults.conftest import Trial
from tests.faults.crowd import Crowd, answers_of

CLIENTS = 4
WITHIN = 0.3
"""Seconds after a worker is ready within which one is killed, at random."""


def test_workers_that_are_killed_at_random(start_daemon: StartDaemon, trial: Trial) -> None:
    """Every request is answered, and every answer that carries scores is right."""
    kills = trial.count(short=50, long=2_000)
    chance = random.Random(1)  # noqa: S311 - no secret
    daemon = start_daemon("--workers", "2", "--threads", "1")
    wait_until(daemon.all_ready, "both workers")
    before = daemon.descriptors_at_rest()
    answers = answers_of(daemon, CHELSEA, COFFEE)
    with Crowd(daemon, CLIENTS, answers) as crowd:
        for _ in range(kills):
            daemon.wait_ready()
            time.sleep(chance.uniform(0, WITHIN))
            with trial.attempt():
                kill_one(daemon, chance)
                asked = crowd.asked()
                wait_until(lambda at=asked: crowd.asked() > at, "an answer")  # type: ignore[misc]
        # One that was killed three times while it loaded comes back for work only.
        wait_until(daemon.all_ready, "all workers to be back")
    trial.notes.update(crowd.outcomes)
    trial.words.append(f"of {crowd.asked():,} requests")
    assert set(crowd.outcomes) <= {"right", "worker_died"}, crowd.outcomes
    assert crowd.outcomes["right"] > kills
    assert daemon.descriptors_at_rest() == before
    assert "Traceback" not in daemon.log()


def kill_one(daemon: Daemon, chance: random.Random) -> None:
    """Kill one of the workers, whatever it is at, and return once it is gone."""
    victim = chance.choice(daemon.worker_pids())
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in daemon.worker_pids(), "its end", 10)
