"""Starts the attribute stage again and again and sends it a signal at random moments.

A script, since what has used OpenMP's threads must not fork: everything is imported once, each start is a fork.
Prints what became of each start, as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

HANGS = 120
"""Seconds after which a start, which takes a few, is taken to hang."""


def status(run_dir: Path) -> str:
    """Return what run.json says of the attribute stage."""
    try:
        return str(json.loads((run_dir / "run.json").read_text())["stages"]["attribute"]["status"])
    except (OSError, ValueError, KeyError):
        return "none"


def start(arguments: list[str], log: Path) -> int:
    """Fork a process that runs the command; return its number."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # One that does not end says where it stands, and is no clean end.
    faulthandler.dump_traceback_later(HANGS, exit=True)
    sys.argv = ["spray", *arguments]
    from spray.pipelines import cli

    try:
        cli.main()
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))
    os._exit(99)


def interrupt(arguments: list[str], run_dir: Path, number: signal.Signals, longest: float, rng: random.Random) -> dict:
    """Start the stage, send it a signal at a random moment, say what that met and how the process ended."""
    before = (run_dir / "run.json").stat().st_mtime_ns
    pid = start(arguments, run_dir / "said.txt")
    ended = 0
    # Its own note that the stage runs, not that of the start before.
    while not ended and not (status(run_dir) == "running" and (run_dir / "run.json").stat().st_mtime_ns != before):
        ended, code = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        time.sleep(rng.uniform(0, longest))
        met = sorted(path.name for path in run_dir.glob("shards/*/*"))
        running = status(run_dir) == "running"
        os.kill(pid, number)
        _, code = os.waitpid(pid, 0)
        return {
            "signal": os.WTERMSIG(code) if os.WIFSIGNALED(code) else 0,
            "code": os.WEXITSTATUS(code) if os.WIFEXITED(code) else None,
            "landed": running and status(run_dir) != "done",
            "shards": sum(not name.startswith(".") and name.endswith(".h5") for name in met),
            "writing": any(name.endswith(".tmp") for name in met),
            "left": [str(path) for path in run_dir.rglob(".*.tmp")],
        }
    return {"signal": 0, "code": os.WEXITSTATUS(code), "landed": False, "shards": -1, "writing": False, "left": []}


def main() -> None:
    import shutil

    from spray.pipelines.stages import load

    load(["train", "attribute"])
    prepared, folder, number, wanted, longest, *arguments = sys.argv[1:]
    rng = random.Random(0)
    events: list[dict] = []
    finished = 0
    while sum(event["landed"] for event in events) < int(wanted) or not events[-1]["done"]:
        run_dir = Path(folder) / f"run{finished}"
        if not run_dir.exists():
            shutil.copytree(prepared, run_dir)
        options = [*arguments, f"run_dir={run_dir}"]
        event = interrupt(options, run_dir, signal.Signals[number], float(longest), rng)
        if sum(e["landed"] for e in events) >= int(wanted):
            os.waitpid(start(options, run_dir / "said.txt"), 0)
        event["done"] = status(run_dir) == "done"
        finished += event["done"]
        events.append(event)
        if len(events) > 10 * int(wanted):
            break
    print(json.dumps(events))


if __name__ == "__main__":
    main()
