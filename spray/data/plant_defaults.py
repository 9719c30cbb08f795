"""The options of a planted artifact, apart from the code that draws it: the configuration's schema needs only these."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "kind": "tag",
    "class": 0,
    "rate": 0.25,
    "seed": 0,
    "place": "top_left",
    "size": 6,
    "jitter": 2,
    # Three numbers, or `random`: another one for each image; null: the kind's own.
    "color": None,
    # How opaque, above 0 up to 1; null: as the kind is by itself.
    "strength": None,
    # kind=mislabel: the class that the samples are said to be of; null: each some other one, drawn at random.
    "to": None,
    # kind=missing: which of the class's images are left out.
    "which": "dark",
}
"""The keys of `dataset.plant` and what they are where nothing is said; `kind: none` plants nothing."""
