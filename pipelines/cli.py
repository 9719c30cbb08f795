"""The command `spray`: Hydra's configuration and sweeps, one line for a mistake, an exit code that tells."""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import sys
import traceback
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spray.errors import UserError
from spray.pipelines.preemption import RESUME, Preempted, check, listening
from spray.pipelines.sweeps import ENDS, JobEnd, Task, lost_job, missing_launcher, stop_local_jobs, write_index

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spray.pipelines.context import Context

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

_UNIQUE = f"{os.getpid()}-{secrets.token_hex(2)}"
_log = logging.getLogger("spray")
# Loggers of libraries; what they say is for run.log.
LIBRARIES = ("py.warnings", "distributed", "tornado", "asyncio", "bokeh", "submitit")
# The folder that the command was last working in.
_folder: list[Path] = []


def main() -> None:
    """Run the command and exit: 0 done, 1 failed, 2 a user's mistake, 75 told to stop, 130 interrupted."""
    with listening():
        code = _main()
    sys.exit(code)


def _main() -> int:
    # Hydra prints a traceback and exits by itself unless it is told to let exceptions through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ENDS.clear()
    _folder.clear()
    _log_to_terminal()
    try:
        try:
            sys.argv[1:] = flags_first(sys.argv[1:])
            _run_hydra()
        except Exception:
            # A library may have made something else of a stop.
            check()
            raise
    except (KeyboardInterrupt, Preempted) as stop:
        stop_local_jobs()
        write_index(ENDS)
        told = f"stopped by {stop}" if isinstance(stop, Preempted) else "interrupted"
        where = f"run_dir={_folder[0]}" if _folder else "the same run_dir"
        print(f"spray: {told}; the same command with {where} goes on from here", file=sys.stderr)
        return RESUME if isinstance(stop, Preempted) else INTERRUPTED
    except BrokenPipeError:
        # The reader of the output, such as `head`, has seen enough; nothing more can be told to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        from spray.pipelines.mistakes import explain_mistake

        line, code = missing_launcher(error) or explain_mistake(error), USER_ERROR
        if line is None:
            line, code = lost_job(error), FAILED
        if line is None:
            traceback.print_exc()
            line = f"{type(error).__name__}: {error}"
        write_index(ENDS)
        print(_error(line), file=sys.stderr)
        return code
    if index := write_index(ENDS):
        _log.info("the runs compared: %s", index)
    return ENDS.worst()


def _run_hydra() -> None:
    import hydra

    from spray.pipelines.config import register_schema

    register_resolvers()
    register_schema()
    task = Task(_job, _prepare, _UNIQUE)
    hydra.main(config_path="pkg://spray.conf", config_name="config", version_base="1.3")(task)()


def _prepare(unique: str) -> None:
    """Get a process that a launcher has started ready for a job of the command with that token."""
    global _UNIQUE
    _UNIQUE = unique
    register_resolvers()
    _log_to_terminal()


def register_resolvers() -> None:
    """Register the resolvers that `conf/config.yaml` uses for folder names."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("spray.unique", lambda: _UNIQUE, replace=True)
    # A plan writes nothing: Hydra, which makes the folder, is then given the one that is there already.
    OmegaConf.register_new_resolver("spray.folder", lambda path, plan: "." if plan else path, replace=True)
    OmegaConf.register_new_resolver(
        "spray.job_folder", lambda overrides, plan: "." if plan else job_folder(overrides), replace=True
    )


def job_folder(overrides: str) -> str:
    """Return the folder of a sweep's job, always the same for the same overrides, such as `seed=0`."""
    name = re.sub(r"[^\w.,=+-]+", "_", overrides)
    if name == overrides and len(name) <= 150:
        return name
    parts = name.split(",")
    # Long ones are mostly paths; what a sweep varies is short.
    while len(",".join(parts)) > 140 and len(parts) > 1:
        parts.remove(max(parts, key=len))
    return f"{','.join(parts)[:140]}-{sha256(overrides.encode()).hexdigest()[:8]}"


def _job(config: DictConfig, typed: list[str]) -> JobEnd:
    """Run one job and say how it ended, so that the other jobs of a sweep go on after a failure."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    settings = HydraConfig.get()
    sweep = settings.mode == RunMode.MULTIRUN
    number = int(settings.job.num) if sweep else 0
    # What this job has and the command line as typed does not is what the sweep varies.
    overrides = OmegaConf.to_container(settings.overrides.task) or []
    as_typed = {argument.lower() for argument in typed}
    # Hydra escapes characters and writes booleans in its own way.
    plain = [re.sub(r"\\(.)", r"\1", str(override)) for override in overrides]
    varied = [override for override in plain if override.lower() not in as_typed]
    name = (",".join(varied) or str(number)) if sweep else ""
    place = {}
    if sweep and not config.plan:
        place = {"folder": str(settings.runtime.output_dir), "sweep": str(Path(settings.sweep.dir).absolute())}
    if sweep:
        _log.info("job %s", name)
        _folder[:] = [Path(settings.sweep.dir).absolute()]
    check()
    try:
        _run_job(config, settings)
    except UserError as error:
        check()
        return JobEnd(number, USER_ERROR, _error(str(error), name), **place)
    except Exception as error:
        check()
        details = Path(settings.runtime.output_dir) / "run.log"
        where = f"; details in {details}" if details.exists() else ""
        return JobEnd(number, FAILED, _error(f"{type(error).__name__}: {error}{where}", name), **place)
    return JobEnd(number, DONE, **place)


def _run_job(config: DictConfig, settings: Any) -> None:
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from spray.pipelines.config import typed_config
    from spray.pipelines.mistakes import explain_mistake
    from spray.pipelines.stages import in_order, load

    try:
        # From plain values, since `+key=value` slips a key past the schema otherwise.
        plain = OmegaConf.to_container(config, resolve=True)
        typed = typed_config(plain)
    except OmegaConfBaseException as error:
        raise UserError(explain_mistake(error)) from error
    if not typed.run_dir.strip():
        raise UserError("run_dir is empty; give a folder as run_dir=DIR or leave it out")
    asked = in_order(typed.stages)
    stages = load(asked, typed)
    from spray.pipelines.context import Context

    if typed.plan:
        from spray.pipelines.plan import print_plan

        sweep = settings.mode == RunMode.MULTIRUN
        run_dir = Path(typed.run_dir, job_folder(settings.job.override_dirname) if sweep else "")
        print_plan(Context(typed, run_dir.absolute(), _log), asked, stages)
        return

    from spray.data import cache
    from spray.pipelines.compute.base import KNOWN
    from spray.pipelines.runner import locked, run_stages

    run_dir = Path(settings.runtime.output_dir)
    typed.run_dir = str(run_dir)
    _folder[:] = _folder or [run_dir]
    known = run_dir / KNOWN if "attribute" in asked and typed.compute.name != "serial" else None
    with locked(run_dir), cache.shared_in(known):
        handler = _log_to_file(run_dir / "run.log")
        try:
            _write_config(run_dir / ".hydra", config, settings)
            context = Context(typed, run_dir, _log)
            try:
                run_stages(context, asked, stages)
            except Exception:
                if "report" in asked:
                    from spray.pipelines.report import report_failure

                    report_failure(context)
                raise
            _track(context)
            if sys.stdout.isatty():
                _show_summary(run_dir)
            _log.info("results in %s", run_dir)
        except (KeyboardInterrupt, Preempted) as stop:
            handler.handle(_log.makeRecord("spray", logging.INFO, __file__, 0, "stopped: %r", (stop,), None))
            raise
        except BaseException:
            # The traceback is for the file; the terminal gets one line.
            handler.handle(_log.makeRecord("spray", logging.ERROR, __file__, 0, "failed", (), sys.exc_info()))
            raise
        finally:
            for name in ("spray", *LIBRARIES):
                logging.getLogger(name).removeHandler(handler)
            handler.close()


def _track(context: Context) -> None:
    """Write what was found for the tracker; the results are there whatever becomes of that."""
    from spray.pipelines.tracking import track

    try:
        folder = track(context)
    except (OSError, RuntimeError, ValueError, UserError) as error:
        _log.warning("tracker=%s could not be written: %s", context.config.tracker, " ".join(str(error).split()))
        return
    if folder is not None:
        _log.info("tracker=%s: %s", context.config.tracker, folder)


def _show_summary(run_dir: Path) -> None:
    """Print what was found; whatever is wrong with that can't make a finished run a failed one."""
    from spray.pipelines.summary import summary

    try:
        lines = summary(run_dir)
    except Exception as error:
        _log.debug("no summary: %r", error)
        return
    print("\n" + "\n".join(lines))


def _write_config(folder: Path, config: DictConfig, settings: Any) -> None:
    """Write what Hydra would have written, now that the run directory is ours."""
    from omegaconf import OmegaConf

    from spray.storage import write_text

    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    write_text(folder / "hydra.yaml", OmegaConf.to_yaml(OmegaConf.create({"hydra": settings})))
    write_text(folder / "overrides.yaml", OmegaConf.to_yaml(settings.overrides.task))


def flags_first(arguments: list[str]) -> list[str]:
    """Return the arguments with flags before overrides, since Hydra takes no flag between two overrides.

    Raises
    ------
    UserError
        For a flag that there is not; Hydra's own parser would print its usage over many lines.
    """
    from hydra._internal.utils import get_args_parser

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(f"{message}; `spray --help` shows what there is")

    parser = get_args_parser()
    parser.__class__ = Parser
    overrides = parser.parse_intermixed_args(arguments).overrides
    flags = list(arguments)
    for override in reversed(overrides):
        # From the end, since a flag's value stands right behind it.
        del flags[len(flags) - 1 - flags[::-1].index(override)]
    return flags + overrides


def _log_to_terminal() -> None:
    for handler in list(_log.handlers):
        _log.removeHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    _log.addHandler(terminal)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.propagate = False
        library.addHandler(logging.NullHandler())
    logging.captureWarnings(True)


def _log_to_file(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("spray", *LIBRARIES):
        logging.getLogger(name).addHandler(handler)
    return handler


def _error(message: str, job: str = "") -> str:
    """Return the one line that tells of a failure."""
    return f"spray: error: {f'job {job}: ' if job else ''}{' '.join(message.split())}"


if __name__ == "__main__":
    # Under its own name, since functions of `__main__` can't be sent to other processes by name.
    from spray.pipelines.cli import main as command

    command()
