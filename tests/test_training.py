"""Training, prediction and the small network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spray.data.arrays import ArrayDataset
from spray.data.base import Normalizer
from spray.models.small_cnn import SmallCNN
from spray.training import batches, predict, train

NORMALIZER = Normalizer([0.5], [0.25])


def dataset(n: int = 96, seed: int = 0) -> ArrayDataset:
    """Three classes told apart by which third of the picture is bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 120, (n, 1, 6, 6), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 2] += 100
    return ArrayDataset(images, labels, ("a", "b", "c"))


def network(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def fit(model: nn.Module, data: ArrayDataset | None = None, **options: object) -> nn.Module:
    settings: dict = {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "weight_decay": 0.0, "seed": 0}
    train(model, data or dataset(), NORMALIZER, **(settings | options))
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learns_and_ends_in_eval_mode() -> None:
    model = fit(network(), epochs=8)
    assert not any(module.training for module in model.modules())
    unseen = dataset(60, seed=1)
    assert (predict(model, unseen, NORMALIZER).argmax(dim=1).numpy() == unseen.labels).mean() > 0.95


def test_the_seed_decides_and_the_random_state_of_the_caller_stays() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = weights(fit(network()))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(99)
    assert torch.equal(weights(fit(network())), first)
    assert not torch.equal(weights(fit(network(), seed=1)), first)


def test_dropout_follows_the_seed_too() -> None:
    whole = {"batch_size": 96, "epochs": 2}
    assert not torch.equal(weights(fit(network(), **whole, seed=0)), weights(fit(network(), **whole, seed=1)))
    no_dropout = [weights(fit(network(dropout=0), **whole, seed=seed)) for seed in (0, 1)]
    torch.testing.assert_close(*no_dropout, atol=1e-5, rtol=1e-4)


def test_equals_a_loop_written_out() -> None:
    data, model, other = dataset(), network(dropout=0), network(dropout=0)
    losses: list[tuple[int, float]] = []
    fit(
        model,
        data,
        epochs=3,
        batch_size=40,
        weight_decay=0.1,
        on_epoch=lambda epoch, loss: losses.append((epoch, loss)),
    )
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=9, pct_start=0.2)
    order, expected = np.random.default_rng(0), []
    x = (torch.from_numpy(data.images).float() / 255 - 0.5) / 0.25
    for epoch in range(3):
        permutation, total = order.permutation(96), 0.0
        for part in (permutation[:40], permutation[40:80], permutation[80:]):
            loss = nn.functional.cross_entropy(other(x[part]), torch.from_numpy(data.labels[part]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(part)
        expected.append((epoch + 1, pytest.approx(total / 96, rel=1e-4)))
    torch.testing.assert_close(weights(model), weights(other))
    assert losses == expected


def test_frozen_parameters_stay() -> None:
    model = network()
    model[1].requires_grad_(False)
    before = model[1].weight.clone()
    fit(model)
    assert torch.equal(model[1].weight, before)
    assert not torch.equal(model[4].weight, network()[4].weight)


def test_every_sample_is_seen_once_in_each_epoch_and_transforms_get_pixels() -> None:
    data, seen = dataset(), []

    def look(pixels: Tensor, indices: np.ndarray) -> Tensor:
        assert torch.equal(pixels, data.batch(indices))
        seen.append(indices)
        return pixels

    fit(network(), data, epochs=2, batch_size=36, transform=look)
    assert [len(part) for part in seen] == [36, 36, 24] * 2
    for epoch in (seen[:3], seen[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(96))
    assert not np.array_equal(np.concatenate(seen[:3]), np.concatenate(seen[3:]))


def test_what_a_transform_returns_is_trained_on() -> None:
    blank = weights(fit(network(), transform=lambda pixels, _: torch.zeros_like(pixels)))
    assert not torch.equal(blank, weights(fit(network())))
    model = fit(network(), epochs=8, transform=lambda pixels, _: 1 - pixels)
    inverted = predict(model, dataset(seed=1), NORMALIZER, transform=lambda pixels, _: 1 - pixels)
    assert (inverted.argmax(dim=1).numpy() == dataset(seed=1).labels).mean() > 0.9


def test_a_last_batch_of_one_image_does_not_stop_a_batch_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    fit(model, dataset(33), batch_size=16)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("steps", range(1, 12))
def test_however_few_steps_there_are(steps: int) -> None:
    """PyTorch's schedule divides by zero for five, of which a fifth warms up."""
    before = weights(network())
    after = weights(fit(network(), dataset(3 * steps), epochs=1, batch_size=3))
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_batches_cover_everything_once() -> None:
    for n, size in [(0, 4), (1, 4), (8, 4), (9, 4), (3, 100)]:
        parts = list(batches(n, size))
        assert all(1 <= len(part) <= size for part in parts)
        assert [i for part in parts for i in part] == list(range(n))


def test_predict_gives_logits_in_order_whatever_the_batch_size() -> None:
    data, model = dataset(), network().eval()
    whole = predict(model, data, NORMALIZER)
    assert whole.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(whole, model((data.batch(np.arange(96)) - 0.5) / 0.25))
    torch.testing.assert_close(predict(model, data, NORMALIZER, batch_size=7), whole)
    chosen = np.array([5, 90, 5, 0])
    torch.testing.assert_close(predict(model, data, NORMALIZER, indices=chosen), whole[chosen])
    assert predict(model, data, NORMALIZER, indices=np.array([], dtype=int)).shape == (0, 3)
    assert not whole.requires_grad


def test_predict_transforms_pixels_with_the_samples_indices() -> None:
    data, model, seen = dataset(), network().eval(), []

    def blank(pixels: Tensor, indices: np.ndarray) -> Tensor:
        seen.extend(indices)
        return torch.zeros_like(pixels)

    logits = predict(model, data, NORMALIZER, indices=np.array([3, 1, 2]), batch_size=2, transform=blank)
    assert seen == [3, 1, 2]
    torch.testing.assert_close(logits, logits[:1].expand(3, -1))


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 32), (1, 28), (3, 50)])
def test_the_small_network_takes_any_size(channels: int, size: int) -> None:
    model = SmallCNN(channels, 7, width=4).eval()
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_small_network_has_the_layers_it_says() -> None:
    model = SmallCNN(3, 8)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(3, 32), (32, 64), (64, 64)]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(1024, 128), (128, 8)]
    state = model.state_dict()
    SmallCNN(3, 8).load_state_dict(state, strict=True)
