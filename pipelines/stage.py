"""What a stage of a run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig
    from spray.pipelines.context import Context


@dataclass(frozen=True)
class Stage:
    """One step of a run: what it reads, what decides its result, what it writes.

    Attributes
    ----------
    name : str
        Its name, as in `stages=[…]`.
    needs : tuple of str
        Stages whose outputs it reads.
    settings : tuple of str
        Dotted configuration paths that decide its result, such as "dataset" or "model.epochs".
    outputs : tuple of str
        Files relative to the run directory. A glob (`corrected/*.pt`) or a folder (`virelay/`) may be
        empty; a plain file has to be there when the stage is done.
    run : callable
        Does the work; what it returns is kept in run.json as the stage's facts.
    tidy : callable, optional
        Removes what had to be kept until run.json says that the stage is done.
    also_needs : callable, optional
        Names the stages that it needs besides `needs`, by the configuration.
    """

    name: str
    needs: tuple[str, ...]
    settings: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[Context], dict[str, Any] | None]
    tidy: Callable[[Context], None] = lambda context: None
    also_needs: Callable[[SprayConfig], tuple[str, ...]] = lambda config: ()
