"""Draws the README's picture from a run: what was found, how it acts, what correcting the model brings.

python scripts/readme_picture.py RUN_DIR notebooks/found.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from omegaconf import OmegaConf

from spray.data.loading import DATASETS
from spray.data.planting import planted
from spray.figures import fitted, gallery
from spray.store import open_attributions

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 9
MODELS = {"original": "as trained", "fine_tuned": "fine-tuned\n(control)", "a_clarc": "A-ClArC", "p_clarc": "P-ClArC"}


def main(run_dir: Path, target: Path) -> None:
    """Draw the first artifact of a run."""
    config = OmegaConf.load(run_dir / ".hydra" / "config.yaml").dataset
    train = planted(DATASETS.get(config.name)(config)[0], OmegaConf.to_container(config.plant, resolve=True))
    first = json.loads((run_dir / "artifacts.json").read_text())["artifacts"][0]
    models = json.loads((run_dir / "verification.json").read_text())["models"]
    chosen = np.sort(np.random.default_rng(0).permutation(first["samples"])[:SHOWN])
    with open_attributions(run_dir / "attributions.h5") as file:
        relevance = fitted(file.attribution[chosen], train.image_shape[1:])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.3), width_ratios=[1.9, 1], layout="constrained")
    left.imshow(gallery(train.batch(chosen).numpy(), relevance, [""] * SHOWN, columns=3))
    left.set_axis_off()
    left.set_title(
        f"Found in '{first['class_name']}': {len(first['samples'])} images with what turns "
        f"{first['flip_rate']:.0%} of other images\ninto '{first['class_name']}' "
        f"(control patch: {first['control_flip_rate']:.0%}). Image, relevance, overlay:",
        fontsize=9,
        loc="left",
    )
    names = [name for name in MODELS if name in models]
    for offset, key, label, color in (
        (-0.2, "clean_accuracy", "clean test images", "#7a86a8"),
        (0.2, "attacked_accuracy", "with the artifact added", "#c2553b"),
    ):
        heights = [models[name][key] for name in names]
        low, high = np.array([models[name][f"{key}_interval"] for name in names]).T
        places = np.arange(len(names)) + offset
        right.bar(places, heights, 0.38, label=label, color=color)
        error = np.clip([np.subtract(heights, low), np.subtract(high, heights)], 0, None)
        right.errorbar(places, heights, error, fmt="none", ecolor="#333", lw=1, capsize=2)
    right.set_xticks(range(len(names)), [MODELS[name] for name in names], fontsize=8)
    right.set_ylim(0, 1)
    right.set_title("Accuracy, with 95 % intervals", fontsize=9, loc="left")
    right.legend(fontsize=7, frameon=False, loc="upper center", ncols=2, bbox_to_anchor=(0.5, -0.16))
    right.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
