"""Explaining many samples: what is kept, reading ahead, batch sizes, samples that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

from spray.bulk.batch_size import find_batch_size, is_out_of_memory
from spray.bulk.explainer import Explainer, TooManyBadSamplesError
from spray.bulk.keeping import Keeping, kept_arrays
from spray.bulk.reading import read_ahead
from spray.data.arrays import ArrayDataset
from spray.errors import UserError

CPU = torch.device("cpu")
N = 40


@pytest.fixture
def dataset() -> ArrayDataset:
    images = np.random.default_rng(0).integers(1, 256, (N, 3, 8, 8), np.uint8)
    return ArrayDataset(images, np.arange(N) % 4, list("abcd"))


class Fragile:
    """Attributes each pixel to itself; fails as told where certain samples are in a batch, or too many."""

    def __init__(self, bad: Mapping[int, Exception] | None = None, room: int = 1000) -> None:
        self.bad, self.room = dict(bad or {}), room
        self.sizes: list[int] = []

    def __call__(self, pixels: Tensor, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        self.sizes.append(len(indices))
        if len(indices) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        for index in indices:
            if int(index) in self.bad:
                raise self.bad[int(index)]
        return {"": pixels, "inner": pixels.flatten(1)[:, :5]}, pixels.sum((2, 3))


def explainer(
    attribute: Fragile, dataset: ArrayDataset, most_bad: int = 5, keeping: Keeping | None = None
) -> Explainer:
    empty = {"attribution": ((3, 8, 8), "float32"), "prediction": ((3,), "float32"), "layer/inner": ((5,), "float32")}
    return Explainer(attribute, dataset, keeping or Keeping(), empty, CPU, most_bad)


def test_what_is_kept_is_the_sum_of_channels_averaged_down() -> None:
    R = torch.randn(4, 3, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = Keeping("sum", 4, "float16")(R)
    by_hand = R.numpy().sum(1).reshape(4, 4, 3, 4, 2).mean((2, 4))
    assert kept.dtype == torch.float16
    assert tuple(kept.shape[1:]) == Keeping("sum", 4).shape((3, 12, 8)) == (1, 4, 4)
    np.testing.assert_allclose(kept[:, 0].float().numpy(), by_hand, atol=2e-3)


def test_a_map_smaller_than_the_pool_stays_as_it_is() -> None:
    R = torch.randn(2, 3, 5, 6)
    assert torch.equal(Keeping("all", 8)(R), R)


def test_relevance_too_large_for_float16_is_an_error_and_not_infinity() -> None:
    R = torch.full((1, 1, 2, 2), 1e5)
    with pytest.raises(UserError, match=r"1e\+05.*float16"):
        Keeping("all", None, "float16")(R)
    with pytest.raises(UserError, match="layer 'conv'"):
        kept_arrays({"": R / 1e5, "conv": R.flatten(1)}, R.flatten(1), Keeping("all", None, "bfloat16"))


def test_what_float16_cannot_hold_is_measured() -> None:
    torch.manual_seed(0)
    R = torch.randn(2, 3, 8, 8)
    half, exact = Keeping(dtype="float16"), Keeping()
    assert half.lost(R) == pytest.approx(float((R - R.half().float()).abs().sum() / R.abs().sum()), rel=1e-6)
    assert half.lost(R) < 1e-3
    # Half of what is there is far below the smallest number of float16, 6e-8.
    R = torch.cat([torch.full((1, 1, 8, 8), 1e-9), torch.zeros(1, 1, 8, 8)])
    assert half.lost(R) == 1
    R[1, 0, 0, 0] = 64e-9 * 3
    assert 0.2 < half.lost(R) < 0.5
    assert exact.lost(R) == half.lost(torch.zeros(1, 1, 2, 2)) == 0


def test_batches_come_in_order_and_are_read_before_they_are_asked_for(dataset: ArrayDataset) -> None:
    begun: list[int] = []

    class Slow:
        def batch(self, indices: np.ndarray) -> Tensor:
            begun.append(int(indices[0]))
            time.sleep(0.02 if indices[0] else 0.1)  # the first one comes last
            return dataset.batch(indices)

    parts = [(k, np.arange(k, k + 4)) for k in range(0, N, 4)]
    reading = read_ahead(Slow(), iter(parts), depth=3, threads=3)  # type: ignore[arg-type]
    first = next(reading)
    assert len(begun) >= 3
    reads = [first, *reading]
    assert [read.tag for read in reads] == [k for k, _ in parts]
    assert all(torch.equal(read.pixels, dataset.batch(read.indices)) for read in reads)  # type: ignore[arg-type]


def test_a_batch_that_cannot_be_read_comes_as_its_error() -> None:
    class Broken:
        def batch(self, indices: np.ndarray) -> Tensor:
            if 5 in indices:
                raise OSError("gone")
            return torch.zeros(len(indices), 1, 1, 1)

    reads = list(read_ahead(Broken(), [(None, np.arange(k, k + 2)) for k in (0, 4, 6)]))  # type: ignore[arg-type]
    assert [read.pixels is None for read in reads] == [False, True, False]
    assert str(reads[1].error) == "gone"


def test_no_more_batches_are_read_ahead_than_asked_for() -> None:
    running, most, lock = 0, 0, threading.Lock()
    taken = 0

    class Counting:
        def batch(self, indices: np.ndarray) -> Tensor:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running - taken)
            return torch.zeros(1)

    for _ in read_ahead(Counting(), [(None, np.array([k])) for k in range(30)], depth=4, threads=4):  # type: ignore[arg-type]
        with lock:
            taken += 1
    assert running == 30
    assert most <= 5


def test_reading_starts_no_threads_of_torchs_beside_its_own() -> None:
    def openmp() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "openmp"}

    class Looking:
        def batch(self, indices: np.ndarray) -> Tensor:
            torch.ones(1 << 20).mul_(2)
            seen.append(openmp())
            return torch.zeros(len(indices))

    seen: list[set[int]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert len(list(read_ahead(Looking(), [(None, np.array([k])) for k in range(4)]))) == 4  # type: ignore[arg-type]
        assert (torch.get_num_threads(), 3 in openmp()) == (3, True)
    finally:
        torch.set_num_threads(before)
    assert seen == [{1}] * 4


def test_rows_are_what_the_method_gives(dataset: ArrayDataset) -> None:
    rows = explainer(Fragile(), dataset).rows(np.arange(6), dataset.batch(np.arange(6)))
    assert torch.equal(rows.arrays["attribution"], dataset.batch(np.arange(6)))
    assert rows.arrays["layer/inner"].shape == (6, 5)
    assert rows.quarantined == {}


@pytest.mark.parametrize("bad", [[0], [15], [3, 4], [0, 7, 8, 15], [9]])
def test_samples_that_fail_are_found_and_the_others_lose_nothing(dataset: ArrayDataset, bad: list[int]) -> None:
    fragile = Fragile({index: ValueError(f"no {index}") for index in bad})
    indices = np.arange(16)
    rows = explainer(fragile, dataset).rows(indices, dataset.batch(indices))
    assert rows.quarantined == {index: f"ValueError: no {index}" for index in bad}
    expected = dataset.batch(indices)
    expected[bad] = 0
    assert torch.equal(rows.arrays["attribution"], expected)
    assert not rows.arrays["prediction"][bad].any()


def test_images_that_cannot_be_read_together_are_read_one_by_one(dataset: ArrayDataset) -> None:
    original = dataset.batch

    def batch(indices: np.ndarray) -> Tensor:
        if 3 in indices:
            raise UserError("x.png is truncated")
        return original(indices)

    dataset.batch = batch  # type: ignore[method-assign]
    rows = explainer(Fragile(), dataset).rows(np.arange(8), None)
    assert rows.quarantined == {3: "x.png is truncated"}
    assert torch.equal(rows.arrays["attribution"][4:], original(np.arange(4, 8)))


def test_a_batch_too_large_for_memory_is_halved_and_not_lost(dataset: ArrayDataset) -> None:
    fragile = Fragile(room=6)
    worker = explainer(fragile, dataset)
    rows = worker.rows(np.arange(16), dataset.batch(np.arange(16)))
    assert torch.equal(rows.arrays["attribution"], dataset.batch(np.arange(16)))
    assert rows.quarantined == {}
    assert fragile.sizes == [16, 8, 4, 4, 4, 4]
    fragile.sizes.clear()
    worker.rows(np.arange(16), dataset.batch(np.arange(16)))
    assert fragile.sizes == [4, 4, 4, 4]  # what did not fit isn't tried again


def test_memory_too_small_for_one_image_is_an_error_and_no_bad_sample(dataset: ArrayDataset) -> None:
    with pytest.raises(UserError, match="one image is too much for the memory of cpu"):
        explainer(Fragile(room=0), dataset).rows(np.arange(4), dataset.batch(np.arange(4)))


def test_too_many_bad_samples_stop_the_run_with_their_reason(dataset: ArrayDataset) -> None:
    fragile = Fragile({index: ValueError("broken") for index in range(3)})
    with pytest.raises(TooManyBadSamplesError, match=r"3 of \d+ samples.*broken.*attribution.max_bad"):
        explainer(fragile, dataset, most_bad=2).rows(np.arange(8), dataset.batch(np.arange(8)))


def test_where_nothing_goes_well_it_is_not_the_samples(dataset: ArrayDataset) -> None:
    fragile = Fragile({index: ValueError("broken") for index in range(N)})
    with pytest.raises(TooManyBadSamplesError, match="32 of 32"):
        explainer(fragile, dataset, most_bad=10**6).rows(np.arange(N), dataset.batch(np.arange(N)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


class Machine:
    """A device that takes `setup` + `each` seconds for a batch and has room for so many samples."""

    def __init__(self, setup: float, each: float, room: float = 1e9, per_sample: float = 1.0) -> None:
        self.setup, self.each, self.room, self.per_sample = setup, each, room, per_sample
        self.now, self.taken, self.tried = 0.0, 0.0, []  # type: ignore[var-annotated]

    def run(self, size: int) -> None:
        self.tried.append(size)
        if size * self.per_sample > self.room:
            raise torch.OutOfMemoryError("full")
        self.taken = max(self.taken, size * self.per_sample)
        self.now += self.setup + self.each * size

    def find(self, most: int) -> int:
        return find_batch_size(self.run, most, device=CPU, free=lambda: self.room - self.taken, clock=lambda: self.now)


def test_the_batch_grows_while_that_pays() -> None:
    assert Machine(setup=8, each=1).find(1024) == 128  # doubling 128 gains 3 %
    assert Machine(setup=0, each=1).find(1024) == 1
    assert Machine(setup=1e6, each=1).find(64) == 64


def test_the_batch_stops_before_memory_ends() -> None:
    machine = Machine(setup=1e6, each=1, room=100)
    size = machine.find(1024)
    assert max(machine.tried) <= 64
    assert size <= 64
    blind = Machine(setup=1e6, each=1, room=100)
    found = find_batch_size(blind.run, 1024, device=CPU, free=lambda: 1e12, clock=lambda: blind.now)
    assert found == 64  # 128 ran out of memory


def test_an_error_that_is_not_of_memory_is_not_hidden() -> None:
    def run(size: int) -> None:
        raise ValueError("no rule")

    with pytest.raises(ValueError, match="no rule"):
        find_batch_size(run, 8, device=CPU)
