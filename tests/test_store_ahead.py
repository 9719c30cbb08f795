"""Shards put together while others are computed: the same file, and nothing of it where the work stops."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stored

from spray.store.ahead import AssemblingAhead
from spray.store.assemble import assemble
from spray.store.layout import Layout
from spray.store.shards import DamagedShardError, Shard, plan_shards


def told(shards: Any, total: int, what: str) -> Any:
    """Iterate silently."""
    return shards


def prepared(tmp_path: Path) -> tuple[Layout, list[Shard], Callable[..., Any]]:
    layout = stored.layout()
    plan = plan_shards(layout.n, layout.shard_size)
    return (
        layout,
        plan,
        partial(assemble, tmp_path / "shards", plan, stored.KEY, layout, tmp_path / "ahead.h5", stored.ATTRIBUTES),
    )


def test_the_file_is_the_same_in_whatever_order_the_shards_come(tmp_path: Path) -> None:
    expected = stored.whole(tmp_path / "whole", stored.layout(), stored.arrays(stored.layout())).read_bytes()
    layout, plan, work = prepared(tmp_path)
    data = stored.arrays(layout)
    for seed in range(4):
        order = random.Random(seed).sample(plan, len(plan))
        seen = []
        with AssemblingAhead(work) as assembling:
            for shard in order:
                stored.write(tmp_path / "shards" / shard.name, shard, layout, data)
                assembling.ready(shard.number)

            def progress(shards: Any, total: int, what: str, seen: list[Any] = seen) -> Any:
                kept = list(shards)
                seen.append((what, total, [shard.number for shard in kept]))
                return kept

            facts = assembling.finish(len(plan), progress)
        assert [next(iter(fact.quarantined)) for fact in facts] == [shard.start for shard in plan]
        assert seen == [("shards put together", 4, [0, 1, 2, 3]), ("shards compared", 4, [0, 1, 2, 3])]
        assert (tmp_path / "ahead.h5").read_bytes() == expected
        (tmp_path / "ahead.h5").unlink()


def test_work_that_stops_leaves_nothing_and_no_thread(tmp_path: Path) -> None:
    layout, plan, work = prepared(tmp_path)
    data = stored.arrays(layout)
    for ready in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt), AssemblingAhead(work) as assembling:  # noqa: PT012
            for shard in plan[:ready]:
                stored.write(tmp_path / "shards" / shard.name, shard, layout, data)
                assembling.ready(shard.number)
            time.sleep(0.05 * ready)
            raise KeyboardInterrupt
        assert [name for name in os.listdir(tmp_path) if name != "shards"] == []
        assert not any(thread.name == "spray-assemble" for thread in threading.enumerate())


def test_what_is_wrong_with_a_shard_is_told_at_the_end_and_keeps_nobody_from_computing(tmp_path: Path) -> None:
    layout, plan, work = prepared(tmp_path)
    data = stored.arrays(layout)
    with AssemblingAhead(work) as assembling:
        for shard in plan:
            path = tmp_path / "shards" / shard.name
            stored.write(path, shard, layout, data)
            if shard.number == 1:
                path.write_bytes(path.read_bytes()[:-1])
            assembling.ready(shard.number)
        with pytest.raises(DamagedShardError, match=r"000001.h5 was changed or cut off") as error:
            assembling.finish(len(plan), told)
    assert error.value.path == tmp_path / "shards" / plan[1].name
    assert os.listdir(tmp_path) == ["shards"]
