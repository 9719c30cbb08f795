"""Several classes explained at once: in order, each by an explainer of its own, and all ended by one that fails."""

from __future__ import annotations

import copy
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spray.pipelines.explained import explained
from spray.pipelines.samples import StoppedError

CLUSTERS = [({"class_index": c, "cluster": str(k)}, np.arange(k)) for c in (3, 1, 2) for k in range(2)]


class Explainer:
    """Tells who explained what; `act` is called first."""

    def __init__(self, act: Any) -> None:
        self.act, self.stop, self.threads = act, threading.Event(), []
        # Kept, so that no two are told by the same address.
        self.made: list[Explainer] = []
        self.context = SimpleNamespace(train=SimpleNamespace(image_shape=(1, 8, 8)))
        self.samples = self

    def prepare(self) -> None:
        assert not self.threads

    def another(self) -> Explainer:
        self.made.append(copy.copy(self))
        return self.made[-1]

    def explain(self, cluster: str, c: int, members: np.ndarray, unusual: bool, repeated: bool) -> Any:
        self.threads.append((c, threading.get_ident()))
        self.act(self, c)
        return None if (c, cluster) == (1, "0") else (id(self), c, cluster, len(members), unusual, repeated)


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(explainer: Any, counted: list[int] | None = None) -> list[Any]:
    counted = [] if counted is None else counted
    return explained(explainer, CLUSTERS, lambda row: (row["class_index"] == 2, False), counted.append)


def test_candidates_come_in_the_order_of_clusters_whichever_class_is_done_first() -> None:
    counted: list[int] = []
    explainer = Explainer(lambda _, c: time.sleep(0.2 if c == 3 else 0.0))
    found = run(explainer, counted)
    expected = [(row["class_index"], row["cluster"], len(members)) for row, members in CLUSTERS]
    assert [each[1:4] for each in found] == [each for each in expected if each[:2] != (1, "0")]
    assert [each[4:] for each in found] == [(each[1] == 2, False) for each in found]
    assert sum(counted) == len(CLUSTERS)
    # A class has one explainer, and two classes never share it: its model is changed while it is looked into.
    assert len({each[0] for each in found} | {id(explainer)}) == 4
    assert len({thread for _, thread in explainer.threads}) == 2
    assert all(len({thread for c, thread in explainer.threads if c == one}) == 1 for one in (1, 2, 3))


def test_one_class_that_fails_ends_the_others() -> None:
    def act(explainer: Explainer, c: int) -> None:
        if c == 1:
            raise ValueError("of class 1")
        assert explainer.stop.wait(30)
        raise StoppedError

    start = time.monotonic()
    with pytest.raises(ValueError, match="of class 1"):
        run(Explainer(act))
    assert time.monotonic() - start < 10


def test_an_interrupt_ends_all() -> None:
    def act(explainer: Explainer, _: int) -> None:
        assert explainer.stop.wait(30)
        raise StoppedError

    main = threading.main_thread().ident
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(Explainer(act))
    assert time.monotonic() - start < 10
