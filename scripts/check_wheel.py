"""Checks what a wheel puts into site-packages: `spray`, with its configuration and pipelines."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

names = set(ZipFile(sys.argv[1]).namelist())
tops = {name.split("/")[0] for name in names}
strays = sorted(top for top in tops if top != "spray" and not top.endswith(".dist-info"))
root = Path(__file__).resolve().parent.parent
sources = [*root.glob("conf/**/*.yaml"), *root.glob("pipelines/*.py")]
wanted = {f"spray/{path.relative_to(root)}" for path in sources}
missing = sorted(wanted - names)
if strays or missing or not wanted:
    sys.exit(f"wheel: strays {strays}, missing {missing}")
print(f"{len(names)} files, {len(wanted)} of them configuration and pipelines")
