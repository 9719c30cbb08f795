"""What the scheduling of shards on Dask's workers is made of."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distributed import SchedulerPlugin

from spray.pipelines.compute.dask_search import Search
from spray.pipelines.compute.dask_worker import TOPIC, Setting
from spray.store.shards import Shard


class ShardsFailedError(RuntimeError):
    """Some shards could not be computed; all others are on disk."""


@dataclass
class Work:
    """A shard that is not done yet.

    Attributes
    ----------
    shard : Shard
        The shard.
    is_alone : bool
        It was among several when a worker failed, so that it is tried by itself now.
    reasons : list of str
        Why it failed, each time that it was tried by itself.
    avoided : set of str
        The workers that failed at it.
    deaths : int
        How many workers it ended when it was tried by itself.
    search : Search or None
        Looks for the sample that does it.
    """

    shard: Shard
    is_alone: bool = False
    reasons: list[str] = field(default_factory=list)
    avoided: set[str] = field(default_factory=set)
    deaths: int = 0
    search: Search | None = None


@dataclass
class Task:
    """Shards that a worker has been given."""

    address: str
    works: list[Work]
    future: Any
    is_probe: bool = False


@dataclass
class Node:
    """A worker process."""

    name: str
    host: str
    task: int | None = None
    is_leaving: bool = False


@dataclass
class Crew:
    """What a kind of cluster says about its workers.

    Attributes
    ----------
    setting : Setting
        How they work.
    logs : str
        Where what they print is.
    heal : callable or None
        Asks for workers that were lost; it is told the names of those that are there.
    patience : float or None
        Seconds to wait for a worker while there is none; None: for ever, as in a batch system's queue.
    """

    setting: Setting
    logs: str
    heal: Callable[[set[str]], None] | None = None
    patience: float | None = None


class Watch(SchedulerPlugin):
    """Passes what happens on the scheduler to the main thread."""

    name = "spray-watch"

    def __init__(self, events: queue.SimpleQueue[tuple[str, Any]]) -> None:
        self.events = events

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Tell of a worker that joined."""
        state = scheduler.workers[worker]
        self.events.put(("joined", (worker, str(state.name), state.host)))

    def log_event(self, topic: str, msg: Any) -> None:
        """Tell of a worker that left, and pass on what workers say."""
        if topic == TOPIC:
            self.events.put(("told", msg))
        elif topic == "all" and isinstance(msg, dict) and msg.get("action") == "remove-worker":
            self.events.put(("left", (msg["worker"], bool(msg.get("expected")))))
