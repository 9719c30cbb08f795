"""Reads projects that ViRelAy opens, be they spray's own or CoRelAy's: images, heatmaps, analyses.

Nothing in such a project is believed before it is checked, and HDF5 files that refer to others are refused (see
`spray.store.foreign`). Nothing is known of the model but its outputs, so what is read can be ranked, not isolated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spray.data.base import ImageDataset
from spray.data.listed import printable
from spray.errors import UserError
from spray.storage import hdf5_writer, read_json
from spray.store.analyses import class_group, open_analysis

log = logging.getLogger(__name__)

LARGEST_TEXT = 64 << 20
"""Bytes of `project.yaml` and of the label map that are read."""


@dataclass(frozen=True)
class Label:
    """One row of the label map: what class a number, and a category of the analyses, stands for."""

    index: int
    category: str
    name: str


@dataclass(frozen=True)
class Project:
    """What `project.yaml` and its label map say.

    Attributes
    ----------
    path : Path
        Of `project.yaml`.
    name, model : str
        For people.
    labels : tuple of Label
        By ascending index.
    dataset : mapping
        The section `dataset`.
    attribution_method, attribution_strategy : str
        How the heatmaps were made.
    attributions : tuple of Path
        Files of heatmaps, in the order in which they are searched for a sample.
    analyses : dict of str to tuple of Path
        Files of analyses by the name of the method.
    """

    path: Path
    name: str
    model: str
    labels: tuple[Label, ...]
    dataset: Mapping[str, Any]
    attribution_method: str
    attribution_strategy: str
    attributions: tuple[Path, ...]
    analyses: Mapping[str, tuple[Path, ...]]

    def images(self) -> ImageDataset:
        """Return the images with their classes: those of the label map that have any.

        Raises
        ------
        UserError
            If they cannot be read, differ in size, or have more than one label each.
        """
        from spray.virelay_images import project_images

        return project_images(self)

    def analysis(self, name: str | None = None) -> tuple[str, tuple[Path, ...]] | None:
        """Return name and files of an analysis: of the first one, if no name is given; None where there is none.

        Raises
        ------
        UserError
            If there is no analysis of that name.
        """
        if name is None:
            return next(iter(self.analyses.items()), None)
        if name not in self.analyses:
            has = ", ".join(self.analyses) or "none"
            raise UserError(f"{self.path} has no analysis {name!r}; it has: {has} (dataset.options={{analysis: NAME}})")
        return name, self.analyses[name]


def read_project(path: Path | str) -> Project:
    """Read `project.yaml` and the label map that it names.

    Parameters
    ----------
    path : Path or str
        Of the YAML file, or of the folder that holds `project.yaml`.

    Raises
    ------
    UserError
        If a file is missing, damaged, or not as ViRelAy 0.6 wants it.
    """
    path = Path(path).expanduser()
    path = path / "project.yaml" if path.is_dir() else path
    try:
        contents = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from None
    try:
        project = _mapping(contents, "")["project"]
        project = _mapping(project, "project")
        dataset = _mapping(project["dataset"], "project.dataset")
        attributions = _mapping(project["attributions"], "project.attributions")
        analyses: dict[str, tuple[Path, ...]] = {}
        for number, entry in enumerate(project.get("analyses") or []):
            entry = _mapping(entry, f"project.analyses[{number}]")
            method = str(entry["analysis_method"])
            analyses[method] = (*analyses.get(method, ()), *_sources(path, entry["sources"]))
        return Project(
            path=path,
            name=str(project["name"]),
            model=str(project["model"]),
            labels=_label_map(path.parent / str(project["label_map"])),
            dataset=dataset,
            attribution_method=str(attributions.get("attribution_method", "unknown")),
            attribution_strategy=str(attributions.get("attribution_strategy", "unknown")),
            attributions=_sources(path, attributions["sources"]),
            analyses=analyses,
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {error.args[0]!r}, which a project of ViRelAy with heatmaps has") from None
    except TypeError as error:
        raise UserError(f"{path} is no project of ViRelAy: {error}") from None


def write_analysis(project: Project, name: str | None, dataset: ImageDataset, path: Path) -> list[str]:
    """Write the categories of a project's analysis that are classes as spray keeps them, under the class's number.

    Parameters
    ----------
    project : Project
        As `read_project` returns it.
    name : str, optional
        Of the analysis; by default the first one.
    dataset : ImageDataset
        The project's images.
    path : Path
        Of the new file.

    Returns
    -------
    list of str
        Categories that were left out, since they aren't classes.

    Raises
    ------
    UserError
        If a file is damaged or foreign, there is no such analysis, or none of its categories is a class.
    """
    found = project.analysis(name)
    if found is None:
        raise UserError(f"{project.path} has no analyses; dataset.options={{analysis: none}} clusters its heatmaps")
    left_out: list[str] = []
    done: set[int] = set()
    with hdf5_writer(path) as target:
        for source in found[1]:
            with open_analysis(source, len(dataset)) as analysis:
                for category in analysis.names:
                    group = analysis.group(category)
                    c = _class_of(project, category, group.index, dataset)
                    if c is None or c in done:
                        left_out.append(category)
                        continue
                    done.add(c)
                    at = target.create_group(class_group(c))
                    at.attrs["class_name"], at.attrs["kind"] = dataset.classes[c], "class"
                    at.create_dataset("index", data=group.index.astype(np.uint32))
                    for clustering in group.clusterings:
                        if clustering != "train_split":  # CoRelAy's note of what it trained on
                            at.create_dataset(f"cluster/{clustering}", data=group.labels(clustering).astype(np.int32))
                    for embedding in group.embeddings:
                        values = at.create_dataset(f"embedding/{embedding}", data=group.embedding(embedding))
                        if len(eigenvalues := group.eigenvalues(embedding)):
                            values.attrs["eigenvalue"] = eigenvalues.astype(np.float32)
    if not done:
        raise UserError(
            f"{project.path}: no category of the analysis {found[0]!r} is a class ({', '.join(left_out[:5])}); "
            "dataset.options={analysis: none} clusters the heatmaps of each class"
        )
    return left_out


def _class_of(project: Project, category: str, index: np.ndarray, dataset: ImageDataset) -> int | None:
    """Return the class that a category stands for, None if it is none: by its id, and by what its samples are."""
    labels = np.unique(dataset.labels[index])
    if len(labels) != 1:
        return None
    c = int(labels[0])
    said = next((label.name for label in project.labels if label.category == category), None)
    return c if said in (None, dataset.classes[c]) else None


def _label_map(path: Path) -> tuple[Label, ...]:
    try:
        _text(path)
        rows = read_json(path)
        found = [Label(int(row["index"]), str(row["word_net_id"]), printable(str(row["name"]))) for row in rows]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is no label map of ViRelAy ({type(error).__name__}: {error})") from None
    if len({label.index for label in found}) < len(found) or not found:
        raise UserError(f"{path} is no label map of ViRelAy: it is empty, or an index is there twice")
    count = [label.name for label in found]
    own = [
        Label(row.index, row.category, row.name if count.count(row.name) == 1 else f"{row.name} ({row.index})")
        for row in found
    ]
    return tuple(sorted(own, key=lambda label: label.index))


def _sources(project: Path, sources: Any) -> tuple[Path, ...]:
    if not isinstance(sources, list) or not sources or not all(isinstance(source, str) for source in sources):
        raise TypeError(f"sources must be a list of files, not {sources!r}")
    return tuple(project.parent / source for source in sources)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{where or 'it'} is no mapping")
    return value


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path} is too large for what it should be")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def numbered(files: Sequence[Path]) -> Iterator[str]:
    """Yield what tells that files changed: name, size and time of change of each."""
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        yield f"{path.name} {status.st_size} {status.st_mtime_ns}"
