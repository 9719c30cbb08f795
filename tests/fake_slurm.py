"""A Slurm of its own for tests: `sbatch` runs the script here, in the background; `squeue` and `scancel` know it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

SBATCH = """\
#!/usr/bin/env bash
set -eu
if [ -e "$FAKE_SLURM/refuses" ]; then
    echo "sbatch: error: invalid partition specified: nope" >&2
    exit 1
fi
number=100
until mkdir "$FAKE_SLURM/$number" 2>/dev/null; do number=$((number + 1)); done
job="$FAKE_SLURM/$number"
cp "${@: -1}" "$job/script"
if [ -e "$FAKE_SLURM/breaks" ]; then sed -i '2i exit 1' "$job/script"; fi
out=$(sed -n 's/^#SBATCH -o //p' "$job/script" | sed "s/%J/$number/")
err=$(sed -n 's/^#SBATCH -e //p' "$job/script" | sed "s/%J/$number/")
SLURM_JOB_ID=$number setsid bash "$job/script" >"${out:-/dev/null}" 2>"${err:-/dev/null}" </dev/null &
echo $! >"$job/pid.new"
mv "$job/pid.new" "$job/pid"
echo "Submitted batch job $number"
"""

SQUEUE = """\
#!/usr/bin/env bash
for pid in "$FAKE_SLURM"/*/pid; do
    if kill -0 "$(cat "$pid")" 2>/dev/null; then basename "$(dirname "$pid")"; fi
done
exit 0
"""

SCANCEL = """\
#!/usr/bin/env bash
for number in "$@"; do
    kill -TERM -- "-$(cat "$FAKE_SLURM/$number/pid")" 2>/dev/null
    touch "$FAKE_SLURM/$number/cancelled"
done
exit 0
"""


class FakeSlurm:
    """The commands in `folder`/bin and what they keep in `folder`/jobs."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.folder = folder / "bin", folder / "jobs"
        self.bin.mkdir(parents=True)
        self.folder.mkdir()
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
            path = self.bin / name
            path.write_text(text)
            path.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "FAKE_SLURM": str(self.folder)}

    def jobs(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def pid(self, job: int) -> int:
        return int((self.folder / str(job) / "pid").read_text())

    def is_alive(self, job: int) -> bool:
        try:
            os.killpg(self.pid(job), 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self, job: int) -> None:
        """End a job at once, as a node that fails does."""
        os.killpg(self.pid(job), signal.SIGKILL)

    def close(self) -> None:
        for job in self.jobs():
            end = time.monotonic() + 5
            while self.is_alive(job) and time.monotonic() < end:
                time.sleep(0.05)
            if self.is_alive(job):
                self.kill(job)
