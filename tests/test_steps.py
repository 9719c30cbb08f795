"""One contract for every registered step, and each step against a slow computation or a known answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from spray.analysis.preprocessing import Preprocessing
from spray.analysis.steps import PCA, STEPS, Step
from spray.errors import UserError

ANYWHERE = ("histogram", "marginals", "spectrum")
"""Steps to which a place does not count, if what is moved leaves by one border and comes in by the other."""


@pytest.fixture(params=STEPS.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def maps(n: int = 12, shape: tuple[int, ...] = (3, 12, 9), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, *shape)) * rng.lognormal(size=(n, *[1] * len(shape)))).astype(np.float32)


def through(entry: object, x: np.ndarray, parts: int = 1) -> np.ndarray:
    return Preprocessing([entry]).features(lambda: np.array_split(x, parts), len(x)).values


def step(name: str, **options: object) -> Step:
    return STEPS.get(name)(**options)  # type: ignore[return-value]


def on(name: str, x: np.ndarray, **options: object) -> np.ndarray:
    return step(name, **options)(torch.from_numpy(x)).numpy()


def test_options_are_fields_with_defaults(name: str) -> None:
    kind = STEPS.get(name)
    assert dataclasses.is_dataclass(kind)
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(kind))
    assert step(name) == step(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        step(name).sigma = 1  # type: ignore[attr-defined]


def test_gives_finite_numbers_for_each_sample_and_leaves_its_input_alone(name: str) -> None:
    x = maps()
    before = x.copy()
    features = through(name, x)
    assert features.dtype == np.float32
    width = Preprocessing([name]).width((3, 12, 9))
    assert features.shape == (12, min(width, 12) if STEPS.get(name).fitted else width)
    assert np.isfinite(features).all()
    # It tells samples apart.
    assert len(np.unique(features.round(6), axis=0)) == 12
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(through(name, x), features)


def test_does_not_care_how_samples_are_cut_into_batches(name: str) -> None:
    x = maps(23)
    np.testing.assert_allclose(through(name, x, 5), through(name, x), atol=2e-5 * np.abs(x).max(), rtol=1e-4)


def test_leaves_a_sample_without_relevance_zero_and_the_others_as_they_were(name: str) -> None:
    x = maps(14)
    rest = np.r_[0:3, 4:14]
    expected = through(name, x[rest])
    x[3] = 0
    found = Preprocessing([name]).features(lambda: [x], len(x))
    assert found.used.tolist() == [i != 3 for i in range(14)]
    np.testing.assert_array_equal(found.values[3], 0)
    np.testing.assert_allclose(found.values[rest], expected, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_takes_relevance_of_any_size(name: str, scale: float) -> None:
    x = maps() * np.float32(scale)
    features = through(name, x)
    assert np.isfinite(features).all()
    assert features.any(axis=1).all()


def test_maps_only_are_refused_as_vectors_before_anything_is_computed(name: str) -> None:
    steps = Preprocessing([name])
    if STEPS.get(name).maps:
        with pytest.raises(UserError, match=rf"analysis.steps\[0\]={name} needs heatmaps, not vectors of 30 values"):
            steps.width((30,))
    else:
        assert through(name, maps(shape=(30,))).shape == (12, steps.width((30,)) if name != "pca" else 12)


def test_sum_adds_channels() -> None:
    x = maps()
    np.testing.assert_allclose(on("sum", x)[:, 0], x.sum(axis=1), rtol=1e-5, atol=1e-5)


def test_absolute_and_positive() -> None:
    x = np.float32([[-2, 3, 0]])
    np.testing.assert_array_equal(on("absolute", x), [[2, 3, 0]])
    np.testing.assert_array_equal(on("positive", x), [[0, 3, 0]])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_smooth_is_the_filter_of_scipy_and_keeps_the_sum(sigma: float) -> None:
    x = maps(3, (2, 15, 8))
    found = on("smooth", x, sigma=sigma)
    expected = [[gaussian_filter(channel.astype(float), sigma, mode="reflect") for channel in sample] for sample in x]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found.sum(axis=(2, 3)), x.sum(axis=(2, 3)), atol=1e-2)


def test_normalizations() -> None:
    x = maps(6, (2, 5, 5)) * np.float32(1e-25)  # whose squares are zero in float32
    x64 = x.astype(np.float64).reshape(6, -1)
    expected = x64 / np.abs(x64).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(on("normalize_sum", x).reshape(6, -1), expected, rtol=1e-4)
    expected = x64 / np.linalg.norm(x64, axis=1, keepdims=True)
    np.testing.assert_allclose(on("normalize_l2", x).reshape(6, -1), expected, rtol=1e-4)


def test_marginals_are_sums_of_rows_and_columns() -> None:
    x = maps(4, (2, 6, 3))
    rows, columns = x.sum(axis=3), x.sum(axis=2)
    found = on("marginals", x, ordered=False)
    np.testing.assert_allclose(found, np.concatenate([rows.reshape(4, -1), columns.reshape(4, -1)], 1), atol=1e-4)
    sorted_ = np.concatenate([-np.sort(-part, axis=2).reshape(4, -1) for part in (rows, columns)], 1)
    np.testing.assert_allclose(on("marginals", x), sorted_, atol=1e-4)


def test_histogram_holds_the_share_of_relevance_in_values_of_each_size() -> None:
    x = maps(5, (1, 7, 8))
    found = on("histogram", x, bins=10)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    for sample, shares in zip(x.reshape(5, -1).astype(np.float64), found, strict=True):
        relative = np.arcsinh(sample / np.abs(sample).mean()) / np.arcsinh(56)
        expected, _ = np.histogram(relative, 10, (-1, 1), weights=np.abs(sample) / np.abs(sample).sum())
        np.testing.assert_allclose(shares, expected, atol=1e-5)
    one = np.zeros((2, 1, 7, 8), np.float32)
    one[0, 0, 3, 3], one[1, 0, 0, 0] = 5, -5  # all relevance in one pixel: the largest bin there is
    np.testing.assert_allclose(on("histogram", one, bins=10), np.eye(10)[[9, 0]], atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14), (1, 6)])
def test_spectrum_against_loops(height: int, width: int) -> None:
    x = maps(2, (1, height, width))
    found = on("spectrum", x)
    side = max(height, width)
    for sample, values in zip(x[:, 0], found, strict=True):
        power = np.abs(np.fft.fft2(sample.astype(np.float64))) ** 2
        rings: dict[int, list[float]] = {}
        for i, fy in enumerate(np.fft.fftfreq(height)):
            for j, fx in enumerate(np.fft.fftfreq(width)):
                rings.setdefault(min(round(float(np.hypot(fy, fx)) * side), side // 2), []).append(power[i, j])
        expected = [np.sqrt(np.mean(rings[ring])) if ring in rings else 0 for ring in range(len(values))]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)


def test_spectrum_of_a_wave_is_in_its_ring() -> None:
    wave = np.cos(2 * np.pi * 5 * np.arange(32) / 32, dtype=np.float32)[None, None, :, None].repeat(32, 3)
    assert on("spectrum", wave)[0].argmax() == 5
    assert on("spectrum", wave)[0, [3, 4, 6, 7]].max() < 1e-3 * on("spectrum", wave)[0, 5]


def test_peak_cuts_out_the_surroundings_of_the_strongest_relevance() -> None:
    rng = np.random.default_rng(0)
    patch = 1 + rng.random((2, 5, 5)).astype(np.float32)
    x = np.zeros((3, 2, 20, 16), np.float32)
    for sample, (top, left) in zip(x, [(3, 4), (12, 9), (15, 0)], strict=True):
        sample[:, top : top + 5, left : left + 5] = patch
    found = on("peak", x, size=5)
    assert found.shape == (3, 2, 5, 5)
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0]).sum() > 0.8 * patch.sum()
    corner = np.zeros((1, 1, 6, 6), np.float32)
    corner[0, 0, 0, 5] = 7
    np.testing.assert_array_equal(on("peak", corner, size=3)[0, 0], np.pad([[7.0]], 1))
    assert on("peak", corner, size=4)[0, 0, 2, 2] == 7


@pytest.mark.parametrize("name", ANYWHERE)
def test_place_does_not_count(name: str) -> None:
    x = maps(4, (1, 16, 16))
    moved = np.roll(x, (5, -3), axis=(2, 3))
    np.testing.assert_allclose(on(name, moved), on(name, x), rtol=1e-3, atol=1e-3)
    assert not np.allclose(moved, x)


@pytest.mark.parametrize("components", [3, 40])
def test_pca_equals_that_of_scikit_learn(components: int) -> None:
    from sklearn import decomposition

    rng = np.random.default_rng(0)
    x = (rng.normal(size=(60, 20)) * np.linspace(5, 1, 20) + 100).astype(np.float32)
    found = through({"pca": components}, x, 7)
    m = min(components, 20)
    assert found.shape == (60, m)
    expected = decomposition.PCA(m, svd_solver="full").fit_transform(x.astype(np.float64))
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * signs, atol=2e-3)


def test_pca_of_fewer_samples_than_components() -> None:
    x = maps(5, (30,))
    found = through({"pca": 10}, x)
    assert found.shape == (5, 5)
    distances = np.linalg.norm(found[:, None] - found[None], axis=2)
    np.testing.assert_allclose(distances, np.linalg.norm(x[:, None] - x[None], axis=2), rtol=1e-4, atol=1e-3)


def test_pca_refuses_what_it_has_no_memory_for() -> None:
    steps = Preprocessing(["sum", "pca"])
    assert steps.width((1, 64, 64)) == 64
    with pytest.raises(UserError, match=rf"steps\[1\]: pca takes at most {PCA.MOST} values .*, not 4160; put pool"):
        steps.width((3, 65, 64))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"pool": 0}, "pool.size=0 is out of range"),
        ({"smooth": 0}, "smooth.sigma=0.0 is out of range; it has to be above 0"),
        ({"smooth": float("nan")}, "smooth.sigma=nan has the wrong type"),
        ({"pca": -1}, "pca.components=-1 is out of range"),
        ({"pca": True}, "pca.components=True has the wrong type; it has to be int"),
        ({"histogram": {"bins": 1}}, "histogram.bins=1 is out of range"),
        ({"peak": {"size": 0}}, "peak.size=0 is out of range"),
        ({"marginals": 1}, "marginals.ordered=1 has the wrong type; it has to be bool"),
        ({"pool": {"sise": 3}}, r"pool has no option 'sise' \(did you mean 'size'\?\); allowed: size"),
        ({"sum": 3}, "sum has no options, but was given 3"),
        ({"sum": None, "pool": 3}, "is neither a name nor"),
        (7, "7 is neither a name nor"),
        ("poool", r"unknown step 'poool' \(did you mean 'pool'\?\); allowed: absolute, "),
    ],
)
def test_mistakes_are_told_with_their_place(entry: object, said: str) -> None:
    with pytest.raises(UserError, match=rf"^analysis\.steps\[1\]: .*{said}"):
        Preprocessing(["sum", entry])


def test_a_value_may_be_given_in_three_ways() -> None:
    assert Preprocessing([{"pool": 5}, {"pool": {"size": 5}}, "pool"], grid=5).steps == [step("pool", size=5)] * 3
    assert Preprocessing([{"pool": None}], grid=7).steps == [step("pool", size=7)]
    assert Preprocessing([{"smooth": 2}]).steps == [step("smooth", sigma=2.0)]


def test_a_new_step_needs_no_other_place() -> None:
    @dataclasses.dataclass(frozen=True)
    class Twice(Step):
        def _apply(self, x: Tensor) -> Tensor:
            return 2 * x

    STEPS.register("twice")(Twice)
    try:
        np.testing.assert_array_equal(through("twice", np.ones((1, 2), np.float32)), [[2, 2]])
    finally:
        del STEPS._parts["twice"]
