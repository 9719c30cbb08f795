"""What `run.json` says: provenance of a run, and status, key and outputs of each of its stages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import spray
from spray.errors import UserError
from spray.storage import read_json, sha256, write_json

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "scikit-image", "umap-learn", "h5py")


class Record:
    """The content of a run directory's `run.json`.

    Parameters
    ----------
    run_dir : Path
        The run directory; it need not exist before the first `save`.

    Raises
    ------
    UserError
        If there is a `run.json` that cannot be read.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "run.json"
        self.header: dict[str, Any] = {}
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.stages = dict(read_json(self.path)["stages"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path} is damaged ({error}); choose another run_dir") from error

    def save(self) -> None:
        """Write `run.json`, whole or not at all."""
        write_json(self.path, self.header | {"stages": self.stages})

    def mark_stale(self, name: str) -> None:
        """Note that every result that was computed from stage `name` is out of date."""
        for other, entry in self.stages.items():
            if name in entry.get("upstream", {}) and entry["status"] == "done":
                entry |= {"status": "pending", "stale": f"{name} was recomputed"}
                self.mark_stale(other)


def header(config: SprayConfig, device: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return the provenance part of `run.json`."""
    of_command = ("run_dir", "plan", "stages", "tracker")
    hashed = {key: value for key, value in asdict(config).items() if key not in of_command}
    return {
        "spray_version": spray.__version__,
        "command": sys.argv,
        "config_hash": digest(hashed),
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "git_sha": git_sha(),
        "device": device,
        # Round-off depends on it.
        "threads": torch.get_num_threads(),
        "inputs": dict(inputs),
    }


def digest(value: Any) -> str:
    """Return the SHA-256 of a plain value, written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """Return the time, to the second, with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def git_sha() -> str | None:
    """Return the commit of the checkout that spray runs from, `-dirty` if changed; None outside of one."""
    checkout = Path(spray.__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def find_outputs(run_dir: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files in `run_dir` that match names, folders or globs, sorted."""
    found: set[Path] = set()
    for pattern in patterns:
        for path in run_dir.glob(pattern.rstrip("/")):
            found.update([path] if path.is_file() else path.rglob("*"))
    return sorted(path for path in found if path.is_file() and not path.name.endswith(".tmp"))


def stamp(path: Path) -> tuple[int, int]:
    """Return what tells a file that was written again from one that was not: inode and time of change."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def describe_outputs(run_dir: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return size, hash and stamp of each file, by its name relative to `run_dir`."""
    return {
        path.relative_to(run_dir).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "stamp": list(stamp(path)),
        }
        for path in paths
    }


def changed_output(run_dir: Path, outputs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Say which recorded output is not there any more as it was written; None if all are.

    A file with the same stamp is not read: reading hundreds of gigabytes would take longer than most stages, and what
    a disk does to a file by itself is found by the checksums in it.
    """
    for name, said in outputs.items():
        path = run_dir / name
        if not path.is_file():
            return f"its output {name} is missing"
        same = path.stat().st_size == said["bytes"]
        if not same or (said.get("stamp") != list(stamp(path)) and sha256(path) != said["sha256"]):
            return f"its output {name} changed on disk"
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
