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
    "color": [1.0, 0.85, 0.1],
}
"""The keys of `dataset.plant` and what they are where nothing is said; `kind: none` plants nothing."""
