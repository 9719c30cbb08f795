"""All clusters explained: those of a class one after the other, several classes at once.

Most of the time goes to many small computations that no library spreads over cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import groupby
from threading import Lock
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from spray.bulk.reading import compute_with
from spray.pipelines.candidates import Candidate
from spray.pipelines.explaining import Explainer

IMAGES = 2000
"""Images that a thread holds at once, about ..."""
MEMORY = 8e9
"""... and bytes that these may take in all threads."""


def explained(
    explainer: Explainer,
    clusters: Sequence[tuple[dict[str, Any], np.ndarray]],
    known: Callable[[dict[str, Any]], tuple[bool, bool, float | None]],
    count: Callable[[int], None],
) -> list[Candidate]:
    """Return the candidates of clusters, in their order.

    Parameters
    ----------
    explainer : Explainer
        Of the run.
    clusters : sequence of (dict, ndarray of int)
        Rows of the ranking with their samples, class by class.
    known : callable
        Whether the ranking finds a row's cluster unusual, whether the same is repeated in it, and its strangeness if it
        is a kind of sample that is a stranger in its class.
    count : callable
        Told of each cluster that is done.
    """
    classes = [list(part) for _, part in groupby(clusters, key=lambda each: each[0]["class_index"])]
    cores = torch.get_num_threads()
    room = int(MEMORY / (IMAGES * 4 * np.prod(explainer.context.train.image_shape)))
    threads = max(1, min(cores, len(classes), room))
    explainer.samples.prepare()
    counting = Lock()

    def of_class(part: Sequence[tuple[dict[str, Any], np.ndarray]]) -> list[Candidate]:
        mine, found = explainer.another(), []
        for row, members in part:
            candidate = mine.explain(row["cluster"], row["class_index"], members, *known(row))
            found += [candidate] if candidate is not None else []
            with counting:
                count(1)
        return found

    each = max(1, cores // threads)
    with (
        threadpool_limits(each, user_api="blas"),
        ThreadPoolExecutor(threads, initializer=compute_with, initargs=(each,)) as pool,
    ):
        futures = [pool.submit(of_class, part) for part in classes]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [candidate for future in futures for candidate in future.result()]
        except BaseException:
            # Told to stop, or one class failed: the others end at the next thing that they ask of the model.
            explainer.samples.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
