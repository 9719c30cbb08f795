"""What a stage is given: configuration, folder, device, log, data and model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from spray.data.base import ImageDataset, Normalizer
from spray.errors import UserError
from spray.pipelines.live import LiveLine, clock_time, rate_text

if TYPE_CHECKING:
    from spray.data.plant_options import Plant
    from spray.data.planting import PlantedTruth
    from spray.pipelines.config import SprayConfig

T = TypeVar("T")
LOG_SECONDS = 30.0
"""How often progress is told where there is no terminal."""
# Composites whose first layer takes the bounds of the input.
BOUNDED = ("epsilon_gamma_box", "deep_taylor")


def needs_bounds(composite: str | Mapping[str, Any]) -> bool:
    """Return whether a composite's rules want to know the least and greatest value of a pixel."""
    if isinstance(composite, str):
        return composite in BOUNDED
    return "z_box" in composite.values()


class Context:
    """Everything that a stage works with; data and model are made when first asked for.

    Parameters
    ----------
    config : SprayConfig
        The resolved configuration.
    run_dir : Path
        Where outputs go.
    log : logging.Logger
        Where lines about the work go.
    """

    def __init__(self, config: SprayConfig, run_dir: Path, log: logging.Logger) -> None:
        self.config = config
        self.run_dir = run_dir
        self.log = log
        self.key = ""
        """Of the stage that runs: it stands for all that decides its result."""

    @cached_property
    def device(self) -> torch.device:
        """The device that computes."""
        return find_device(self.config.device)

    @cached_property
    def _loaded(self) -> tuple[ImageDataset, ImageDataset]:
        from spray.data.loading import DATASETS
        from spray.data.subset import per_class

        options = self.config.dataset
        train, test = (per_class(part, options.per_class) for part in DATASETS.get(options.name)(options))
        return train, test

    @cached_property
    def _planting(self) -> tuple[ImageDataset, list[PlantedTruth]]:
        from spray.data.planting import plant_all

        return plant_all(self._loaded[0], self.plants)

    @cached_property
    def _datasets(self) -> tuple[ImageDataset, ImageDataset]:
        return self._planting[0], self._loaded[1]

    @cached_property
    def plants(self) -> list[Plant]:
        """What is planted in the training images, by the configuration."""
        from spray.data.plant_options import read_plants

        options, train = self.config.dataset, self._loaded[0]
        return read_plants(options.plant, options.plants, train.classes, train.image_shape)

    @property
    def planted_truths(self) -> list[PlantedTruth]:
        """Which samples carry it. The first stage writes that down; no stage before verification may look at it."""
        return self._planting[1]

    @property
    def train(self) -> ImageDataset:
        """The training images, with the configured artifact planted in them."""
        return self._datasets[0]

    @property
    def test(self) -> ImageDataset:
        """The test images, clean."""
        return self._datasets[1]

    def with_model(self, checkpoint: Path, run_dir: Path) -> Context:
        """Return a context for the same data and settings, but with weights of its own and a folder for its results."""
        config = replace(
            self.config, run_dir=str(run_dir), model=replace(self.config.model, checkpoint=str(checkpoint))
        )
        return self.sibling(run_dir, config)

    def sibling(self, run_dir: Path, config: SprayConfig) -> Context:
        """Return a context for the same images with settings of its own and a folder for its results."""
        part = Context(config, run_dir, self.log)
        part._loaded = self._loaded
        if config.dataset == self.config.dataset:
            # With the truth about what is planted, which is asked for as well.
            part._planting = self._planting
        return part

    @cached_property
    def normalizer(self) -> Normalizer:
        """Maps pixels to the model's input."""
        return Normalizer(self.config.dataset.mean, self.config.dataset.std)

    def build_model(self) -> nn.Module:
        """Return the architecture in eval mode on the device, with the checkpoint if one is configured."""
        checkpoint = self.config.model.checkpoint
        model = self._architecture()
        if checkpoint is not None:
            from spray.correction.wrapped import load_weights

            model = load_weights(model, checkpoint)
        return model.to(self.device).eval()

    def _architecture(self) -> nn.Module:
        """Return the architecture with freshly initialised weights, on the CPU."""
        from spray.models.loading import build_model

        options = self.config.model
        return build_model(
            options.name, options.factory, len(self.train.classes), self.train.image_shape, self.config.seed
        )

    def explain(self, model: nn.Module, images: Tensor, target: int | Tensor | None) -> Tensor:
        """Return the relevance (n, C, H, W) of normalised images of that shape, computed as configured."""
        from spray.attribution import explain

        method, composite, options = self._attribution(images, layers=False)
        result: Tensor = explain(model, images, target, method, composite, **options)
        return result

    def attribute(self, model: nn.Module, images: Tensor, labels: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        """Return what is stored of normalised images (n, C, H, W) whose classes are `labels`.

        Returns
        -------
        dict of str to Tensor
            The relevance of the input under "", and (n, channels) that of the configured inner layers.
        Tensor
            The logits (n, classes).
        """
        from spray.attribution.explanation import explain_with_logits
        from spray.pipelines.validate import find_target

        target = find_target(self.config.attribution.target, len(self.train.classes))
        classes: int | Tensor | None = target if isinstance(target, int) else None
        if target == "label":
            classes = torch.from_numpy(np.asarray(labels, np.int64)).to(images.device)
        method, composite, options = self._attribution(images, layers=True)
        R, logits = explain_with_logits(model, images, classes, method, composite, **options)
        return (R if isinstance(R, dict) else {"": R}), logits

    def trial_images(self, n: int) -> Tensor:
        """Return the first normalised images, or grey ones if one of them can't be read, to try things out on."""
        try:
            pixels = self.train.batch(np.arange(n) % len(self.train))
        except UserError:
            pixels = torch.full((n, *self.train.image_shape), 0.5)
        return self.normalizer(pixels, self.device)

    def layer_sizes(self, model: nn.Module) -> dict[str, int]:
        """Return how many channels each inner layer has whose relevance is stored."""
        R, _ = self.attribute(model, self.trial_images(2), np.zeros(2))
        return {name: relevance.shape[1] for name, relevance in R.items() if name}

    def _attribution(self, images: Tensor, layers: bool) -> tuple[str, Any, dict[str, Any]]:
        """Return method, composite and options as configured."""
        from spray.pipelines.compute.base import stored_layers

        config = self.config.attribution
        options: dict[str, Any] = {}
        lrp = config.method == "lrp"
        if lrp and needs_bounds(config.composite):
            black = torch.zeros(images.shape[1], 1, 1, device=images.device)
            options = {"low": self.normalizer(black), "high": self.normalizer(black + 1)}
        if config.dtype == "bfloat16":
            options["relevance_dtype" if lrp else "autocast"] = "bfloat16"
        if stored := stored_layers(self.config):
            options |= {"layer": ["", *stored], "sum_positions": True} if layers else {}
        elif config.layer:
            options["layer"] = config.layer
        return config.method, config.composite, options | (config.options or {})

    @cached_property
    def model(self) -> nn.Module:
        """The model under study: the architecture with the weights of `model.pt`."""
        return self.load_model(self.run_dir / "model.pt")

    def load_model(self, path: Path) -> nn.Module:
        """Return the architecture in eval mode on the device with the weights at `path`, and the projections there."""
        from spray.correction.wrapped import load_weights

        return load_weights(self._architecture(), str(path)).to(self.device).eval()

    @property
    def batch_size(self) -> int:
        """How many images are put through a model at once outside of the attribute stage."""
        size = self.config.attribution.batch_size
        return 64 if size == "auto" else int(size)

    def predict(self, model: nn.Module, dataset: ImageDataset) -> Tensor:
        """Return a model's logits (n, classes) for a whole dataset, on the CPU."""
        from spray.training import predict

        return predict(model, dataset, self.normalizer, batch_size=self.batch_size, device=self.device)

    @torch.inference_mode()
    def predict_pixels(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Return a model's logits (n, classes) for pixels (n, C, H, W) in [0, 1], on the CPU."""
        parts = pixels.split(self.batch_size)
        return torch.cat([model(self.normalizer(p, self.device)).float().cpu() for p in parts])

    def forget_model(self) -> None:
        """Let the next reader of `model` load it anew, so that no stage sees what another did to it."""
        self.__dict__.pop("model", None)

    def progress(self, iterable: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Yield from `iterable`; count, rate and time left are shown meanwhile."""
        with self.counter(total, what) as count:
            for item in iterable:
                yield item
                count(1)

    @contextmanager
    def counter(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """Give a function that is told how many more are done.

        Count, rate and time left stand in one line of a terminal; elsewhere a line is logged now and then.
        """
        line = LiveLine()
        start = shown = time.monotonic()
        done = 0
        if line.is_terminal and total:
            # The first of a few may take minutes.
            line.show(f"{what}: 0/{total}")

        def count(more: int) -> None:
            nonlocal done, shown
            done += more
            now = time.monotonic()
            if now - shown < (0.2 if line.is_terminal else LOG_SECONDS):
                return
            shown, rate = now, done / (now - start)
            text = f"{what}: {done}/{total}, {rate_text(rate)}, {clock_time((total - done) / rate)} left"
            if line.is_terminal:
                line.show(text)
            else:
                self.log.info("%s", text)

        try:
            yield count
        finally:
            line.clear()


def find_device(name: str) -> torch.device:
    """Return the device called `name`: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises
    ------
    UserError
        If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"device={name} is unknown; allowed: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(f"device={name} is not available: torch sees {count} GPUs; use device=cpu")
    return torch.device(name)
