"""Which worker of a Dask cluster computes which shards, and what is done when one fails.

Dask starts the workers, watches them and carries messages. Which shards go to which worker is decided here,
so that it is known which shard a worker that died or failed was at. What is on disk is the truth: a shard that is
computed twice is the same bytes, and one that is told as done is there.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from distributed import Client, KilledWorker
from distributed.comm import CommClosedError

from spray.errors import UserError
from spray.pipelines.compute.base import Job, ShardResult, make_worker
from spray.pipelines.compute.dask_parts import Crew, Node, ShardsFailedError, Task, Watch, Work
from spray.pipelines.compute.dask_progress import Progress
from spray.pipelines.compute.dask_search import Search
from spray.pipelines.compute.dask_worker import TOPIC, Make, ShardPlugin, run_probe, run_shards
from spray.pipelines.preemption import check
from spray.store.shards import Shard

ATTEMPTS = 3
"""So often is a shard tried, on different workers if there are any."""

DEATHS = 2
"""When a shard has ended so many workers, the sample that does it is looked for."""

IN_A_ROW = 5
"""A worker that fails at so many shards, one after the other, gets no more."""

TASK_SECONDS = 10.0
"""Shards that are given to a worker at once: as many as take about so long."""

HEAL_SECONDS = 10.0
"""How often lost workers are asked for again."""

# Its lines are for run.log.
_details = logging.getLogger("distributed.spray")


class Scheduling:
    """Has shards computed by the workers of a cluster.

    Parameters
    ----------
    cluster : distributed.deploy.spec.SpecCluster
        Where; its scheduler runs in this process.
    crew : Crew
        About its workers.
    log : logging.Logger
        Where lines go.
    job, shards, on_done
        As a backend takes them.
    make : callable
        Builds what computes the shards, in each worker.
    name_of : callable
        What a message calls a sample.
    """

    def __init__(
        self,
        cluster: Any,
        crew: Crew,
        log: logging.Logger,
        job: Job,
        shards: Sequence[Shard],
        on_done: Callable[[ShardResult], None],
        make: Make = make_worker,
        name_of: Callable[[int], str] = str,
    ) -> None:
        self.cluster, self.crew, self.on_done = cluster, crew, on_done
        self.name_of = name_of
        self.client = Client(cluster, set_as_default=False)
        self.plugin = ShardPlugin(job, make, crew.setting)
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.waiting = deque(Work(shard) for shard in shards)
        self.left = {shard.number: shard for shard in shards}
        self.failed: dict[int, str] = {}
        self.nodes: dict[str, Node] = {}
        self.tasks: dict[int, Task] = {}
        # Different shards that a worker failed at since it last did one.
        self.failed_in_a_row: dict[str, set[int]] = {}
        self.builds_failed = 0
        self.last_task = 0
        self.token = secrets.token_hex(4)
        self.seconds: float | None = None
        self.healed = self.seen = time.monotonic()
        self.progress = Progress(log, len(shards), sum(shard.size for shard in shards))

    def run(self) -> None:
        """Compute all shards.

        Raises
        ------
        UserError
            If a worker finds a user's mistake; nothing else is waited for then.
        ShardsFailedError
            If shards could not be computed; all others are done by then.
        """
        try:
            self._register()
            self._call(self._watch())
            while self.left:
                check()
                self._assign()
                self.progress.tick()
                with suppress(queue.Empty):
                    self._handle(*self.events.get(timeout=0.2))
                self._heal()
        finally:
            self.progress.close()
            with suppress(Exception):
                self._call(self._unwatch()).result(timeout=2)
                self.client.close(timeout=2)
        self.progress.finish()
        if self.failed:
            raise ShardsFailedError(self._failure())

    def _register(self) -> None:
        """Hand the plugin to the scheduler, for workers there are and those to come; one of them may die meanwhile."""
        for attempt in range(ATTEMPTS):
            try:
                self.client.register_plugin(self.plugin)
                return
            except CommClosedError:
                if attempt == ATTEMPTS - 1:
                    raise

    async def _watch(self) -> None:
        watch = Watch(self.events)
        self.cluster.scheduler.add_plugin(watch)
        for address in list(self.cluster.scheduler.workers):
            watch.add_worker(self.cluster.scheduler, address)

    async def _unwatch(self) -> None:
        self.cluster.scheduler.remove_plugin(Watch.name)

    def _call(self, coroutine: Any) -> Any:
        """Run a coroutine where the scheduler runs."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.cluster.loop.asyncio_loop)

    def _assign(self) -> None:
        """Give shards to the workers that have none."""
        for address, node in self.nodes.items():
            if node.task is None and not node.is_leaving and not self._is_bad(node.name):
                works = self._take(node)
                if works:
                    self._submit(address, node, works)

    def _take(self, node: Node) -> list[Work]:
        """Take shards for a worker from those that wait."""
        others = {other.name for other in self.nodes.values() if not self._is_bad(other.name)} - {node.name}
        first = next((w for w in self.waiting if node.name not in w.avoided or others <= w.avoided), None)
        if first is None:
            return []
        self.waiting.remove(first)
        works = [first]
        # Towards the end less at once, so that all workers end together.
        most = -(-len(self.waiting) // (2 * max(1, len(self.nodes))))
        wanted = min(int(TASK_SECONDS / self.seconds), most) if self.seconds else 1
        if node.name in self.failed_in_a_row:
            wanted = 1
        while not first.is_alone and len(works) < wanted and self.waiting and not self.waiting[0].is_alone:
            works.append(self.waiting.popleft())
        return works

    def _submit(self, address: str, node: Node, works: list[Work]) -> None:
        number = self.last_task = self.last_task + 1
        part = works[0].search.next() if works[0].search is not None else None
        call = (run_shards, [work.shard for work in works]) if part is None else (run_probe, *part)
        key = f"{TOPIC}-{self.token}-{number}"
        future = self.client.submit(*call, self.token, number, workers=[address], key=key, pure=False, retries=0)
        self.tasks[number] = Task(address, works, future, part is not None)
        node.task = number
        future.add_done_callback(lambda ended: self.events.put(("over", (number, ended))))

    def _handle(self, kind: str, what: Any) -> None:
        if kind == "joined":
            address, name, host = what
            self.nodes[address] = Node(name, host)
            self.progress.names.add(name)
        elif kind == "left":
            self._lost(*what)
        elif kind == "over":
            self._over(*what)
        elif what["run"] != self.token:
            # Of an earlier run, which a worker has not noticed to be over.
            return
        elif what["kind"] == "done":
            self._done(what["task"], ShardResult(**what["result"]))
        elif what["kind"] == "probed":
            self._probed(what["task"], what["can_probe"])
        elif what["kind"] == "ended":
            if (task := self.tasks.get(what["task"])) and task.works:
                self._fail(what["task"], _error("the worker ended without it"))
            self._end(what["task"])
        else:
            self._fail(what["task"], what)
        self.progress.workers = len(self.nodes)

    def _done(self, number: int, result: ShardResult) -> None:
        """Note a shard that is on disk; whoever was given it as well would find it there."""
        shard = self.left.pop(result.number, None)
        if shard is None:
            return
        if result.seconds > 0:
            self.seconds = result.seconds if self.seconds is None else 0.8 * self.seconds + 0.2 * result.seconds
        task = self.tasks.get(number)
        if task is not None:
            task.works = [work for work in task.works if work.shard.number != result.number]
            if task.address in self.nodes:
                self.failed_in_a_row.pop(self.nodes[task.address].name, None)
        self.waiting = deque(work for work in self.waiting if work.shard.number != result.number)
        self.progress.done(shard)
        self.on_done(result)

    def _end(self, number: int) -> tuple[Node | None, list[Work]]:
        """Let the worker of a task that is over be free, and what it left undone wait again."""
        task = self.tasks.pop(number, None)
        if task is None:
            return None, []
        # The key is used up; whatever its state is, nobody waits for it.
        task.future.release()
        node = self.nodes.get(task.address)
        if node is not None and node.task == number:
            node.task = None
        works = [work for work in task.works if work.shard.number in self.left]
        self.waiting.extendleft(reversed(works))
        return node, works

    def _lost(self, address: str, is_expected: bool) -> None:
        """Forget a worker that is gone, on its own accord or not."""
        node = self.nodes.pop(address, None)
        if node is None:
            return
        was_probe = node.task is not None and self.tasks[node.task].is_probe
        works = self._end(node.task)[1] if node.task is not None else []
        if is_expected or node.is_leaving:
            return
        self.progress.losses[node.name] += 1
        at = f"at {_range(works)}" if works else "idle"
        text = "lost worker %s on %s (%s), which was %s; its work is done again"
        self.progress.say(text, node.name, node.host, address, at, level=logging.WARNING)
        if was_probe:
            search = works[0].search if works else None
            if search is not None:
                search.died()
                self._conclude(works[0])
        else:
            self._blame(node, works, f"its worker ({node.name} on {node.host}) died", is_death=True)

    def _probed(self, number: int, can_probe: bool) -> None:
        """Note that a worker outlived some samples of a shard that ended others."""
        works = self._end(number)[1]
        search = works[0].search if works else None
        if search is None:
            return
        if not can_probe:
            works[0].search = None
            return
        search.survived()
        self._conclude(works[0])

    def _conclude(self, work: Work) -> None:
        """Fail a shard whose deadly samples are found; let it be tried as a whole again if there are none."""
        if work.search is None or work.search.next() is not None:
            return
        found, work.search = work.search.culprits, None
        if found:
            self.waiting.remove(work)
            named = ", ".join(map(self.name_of, found))
            self._give_up(work, f"the process that explains sample {named} is ended by it; leave it out")

    def _over(self, number: int, future: Any) -> None:
        """Dask says that a task is over: what the worker told was told before, so that this is about failures."""
        if number not in self.tasks or future.status != "error":
            return
        error = future.exception()
        if not isinstance(error, KilledWorker):
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self._fail(number, _error(text))

    def _fail(self, number: int, what: Mapping[str, Any]) -> None:
        """Note an error that a worker met."""
        if what["hopeless"]:
            raise UserError(what["error"])
        node, works = self._end(number)
        if node is None:
            return
        node.is_leaving = what["leaves"]
        _details.warning("worker %s on %s failed\n%s", node.name, node.host, what["trace"])
        self.progress.failures[node.name] += 1
        text = "worker %s on %s failed at %s: %s"
        self.progress.say(text, node.name, node.host, _range(works), what["error"], level=logging.WARNING)
        if what["building"]:
            self.builds_failed += 1
            if self.builds_failed >= ATTEMPTS and not self.progress.shards_done:
                raise ShardsFailedError(f"no worker could build the model and read the data: {what['error']}")
        self._blame(node, works, what["error"])

    def _blame(self, node: Node, works: list[Work], reason: str, is_death: bool = False) -> None:
        """Note that a worker failed or died at these shards."""
        self.failed_in_a_row.setdefault(node.name, set())
        if len(works) > 1:
            # Which of them it was at isn't known. At the end, so that what nothing is wrong with is done before.
            for work in works:
                work.is_alone = True
                self.waiting.remove(work)
                self.waiting.append(work)
            return
        for work in works:
            self.failed_in_a_row[node.name].add(work.shard.number)
            work.is_alone = True
            work.reasons.append(reason)
            work.avoided.add(node.name)
            work.deaths += is_death
            self.waiting.remove(work)
            if len(work.reasons) >= ATTEMPTS:
                self._give_up(work, reason)
                continue
            self.waiting.append(work)
            if is_death and work.deaths == DEATHS:
                work.search = Search.of(work.shard.start, work.shard.stop)

    def _give_up(self, work: Work, reason: str) -> None:
        """Count a shard as failed."""
        self.left.pop(work.shard.number, None)
        self.failed[work.shard.number] = f"{_range([work])}: {reason}"

    def _give_all_up(self) -> None:
        for work in self.waiting:
            reason = work.reasons[-1] if work.reasons else f"every worker failed at {IN_A_ROW} shards in a row"
            self._give_up(work, reason)

    def _is_bad(self, name: str) -> bool:
        """Say whether a worker gets no more work, since it fails at all that it is given."""
        return len(self.failed_in_a_row.get(name, ())) >= IN_A_ROW

    def _heal(self) -> None:
        """Ask for workers that were lost; give up where none comes or none is of any use."""
        now = time.monotonic()
        if self.nodes:
            self.seen = now
            if all(self._is_bad(node.name) for node in self.nodes.values()):
                self._give_all_up()
        elif self.crew.patience is not None and now - self.seen > self.crew.patience:
            raise ShardsFailedError(f"no worker was there for {self.crew.patience:.0f} s; see {self.crew.logs}")
        if self.crew.heal is not None and self.waiting and now - self.healed > HEAL_SECONDS:
            self.healed = now
            self.crew.heal({node.name for node in self.nodes.values()})

    def _failure(self) -> str:
        # Those first that were tried.
        shown = "; ".join(sorted(self.failed.values(), key=lambda text: "in a row" in text)[:5])
        more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
        # A worker that dies can't say why.
        see = f" (see {self.crew.logs})" if self.progress.losses else ""
        return (
            f"{len(self.failed)} of {self.progress.shards} shards could not be computed: {shown}{more}{see}. All "
            "others are kept; mend the cause and give the same command again"
        )


def _error(text: str) -> dict[str, Any]:
    return {"error": text, "trace": text, "hopeless": False, "building": False, "leaves": False}


def _range(works: Sequence[Work]) -> str:
    """Return what a text calls these shards."""
    if not works:
        return "no shard"
    first, last = works[0].shard, works[-1].shard
    numbers = f"shard {first.number}" if first is last else f"shards {first.number} to {last.number}"
    return f"{numbers} (samples {first.start} to {last.stop - 1})"
