"""Training, prediction and evaluation of image classifiers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spray.data.base import ImageDataset, Normalizer

Transform = Callable[[Tensor, np.ndarray], Tensor]
"""Changes a batch of pixels (n, C, H, W); the second argument holds the samples' indices."""


@dataclass(frozen=True)
class Batch:
    """What a loss is computed of.

    Attributes
    ----------
    x : Tensor
        (n, C, H, W): the model's input, on the device.
    labels : Tensor of int64
        (n,): the classes, on the device.
    indices : ndarray of int64
        (n,): which samples these are.
    pixels : Tensor
        (n, C, H, W) in [0, 1], as transformed, on the CPU.
    """

    x: Tensor
    labels: Tensor
    indices: np.ndarray
    pixels: Tensor


Objective = Callable[[nn.Module, Batch], Tensor]
"""Returns the loss of a model on a batch."""


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    return nn.functional.cross_entropy(model(batch.x), batch.labels)


def train(
    model: nn.Module,
    dataset: ImageDataset,
    normalizer: Normalizer,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    objective: Objective = cross_entropy,
    indices: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    frozen: Collection[nn.Module] = (),
) -> None:
    """Train `model` in place with AdamW and a one-cycle learning rate; leave it in eval mode.

    Parameters
    ----------
    model : nn.Module
        Maps normalised images (n, C, H, W) to logits (n, classes).
    dataset : ImageDataset
        Training images.
    normalizer : Normalizer
        From pixels to the model's input.
    epochs, batch_size, learning_rate, weight_decay
        Of the optimisation; `learning_rate` is the peak.
    seed : int
        Decides order and dropout; the caller's random state stays as it was.
    device : torch.device or str
        Where to train.
    transform : callable, optional
        Applied to every batch of pixels, e.g. to add an artifact.
    on_epoch : callable, optional
        Called with the number of epochs done and the mean loss of the last one.
    objective : callable
        The loss; by default the cross-entropy.
    indices : ndarray of int, optional
        (m,): the samples to train on; by default all.
    weights : ndarray of float, optional
        (m,), at least 0, not all: an epoch's m samples are drawn with these weights, some of them several times;
        by default each comes once.
    frozen : collection of nn.Module
        Modules that stay in eval mode: dropout does nothing there, batch norms keep their statistics.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    n = len(chosen)
    shares = None if weights is None else np.asarray(weights, dtype=np.float64) / np.sum(weights)
    steps = epochs * max(1, -(-n // batch_size))
    # A fifth of five steps is a warm-up that ends where it begins, and OneCycleLR would divide by its length.
    warm_up = 0.2 if steps != 5 else 0.25
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=warm_up)
    order = np.random.default_rng(seed)
    labels = torch.from_numpy(np.asarray(dataset.labels))
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model.train()
        for module in frozen:
            module.eval()
        for epoch in range(epochs):
            drawn = chosen[order.permutation(n) if shares is None else order.choice(n, n, p=shares)]
            total = torch.zeros((), device=device)
            for start in range(0, n, batch_size):
                part = drawn[start : start + batch_size]
                if start and len(part) == 1:
                    continue  # a batch norm cannot train on a single image
                pixels = dataset.batch(part)
                if transform is not None:
                    pixels = transform(pixels, part)
                batch = Batch(normalizer(pixels, device), labels[part].to(device), part, pixels)
                loss = objective(model, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(part)
            if on_epoch is not None:
                on_epoch(epoch + 1, float(total) / n)
    model.eval()


def batches(n: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yield 0, …, n-1 in index arrays of at most `batch_size`."""
    for start in range(0, n, batch_size):
        yield np.arange(start, min(n, start + batch_size))


@torch.inference_mode()
def predict(
    model: nn.Module,
    dataset: ImageDataset,
    normalizer: Normalizer,
    *,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
) -> Tensor:
    """Return the logits, float32 (n, classes) on the CPU, of all images or of those at `indices`."""
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    logits = []
    for part in batches(len(chosen), batch_size):
        pixels = dataset.batch(chosen[part])
        if transform is not None:
            pixels = transform(pixels, chosen[part])
        logits.append(model(normalizer(pixels, device)).float())
    return torch.cat(logits).cpu() if logits else torch.empty(0, len(dataset.classes))
