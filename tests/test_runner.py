"""Resume, recomputation and its reasons, locks, crashes, subsets: fake stages behind the real command."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import first_output

from spray.pipelines import record as records
from spray.pipelines.stages import NAMES

RUN = "run_dir=run"


def record(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_running(run_dir: Path, name: str) -> bool:
    path = run_dir / "run.json"
    return (
        path.exists()
        and record(run_dir)["stages"].get(name, {}).get("status") == "running"
        and (run_dir / first_output(name)).exists()
    )


def test_whole_run_in_order(spray, tmp_path):
    result = spray(RUN)
    assert (result.code, result.err) == (0, "")
    assert tuple(result.ran) == NAMES
    said = record(tmp_path / "run")
    assert {name: entry["status"] for name, entry in said["stages"].items()} == dict.fromkeys(NAMES, "done")
    assert {
        "spray_version",
        "command",
        "config_hash",
        "seed",
        "versions",
        "git_sha",
        "device",
        "inputs",
    } <= set(said)
    assert said["versions"]["torch"]
    assert set(said["inputs"]) == {"dataset.train", "dataset.test"}
    train = said["stages"]["train"]
    assert {"status", "key", "settings", "seconds", "started", "finished", "outputs", "facts"} <= set(train)
    assert train["outputs"]["model.pt"]["bytes"] == (tmp_path / "run/model.pt").stat().st_size
    assert said["stages"]["isolate"]["facts"] == {"read": 2}


def test_hydra_files_and_log(spray, tmp_path):
    spray(RUN, "seed=7")
    assert "seed: 7" in (tmp_path / "run/.hydra/config.yaml").read_text()
    assert "- seed=7" in (tmp_path / "run/.hydra/overrides.yaml").read_text()
    assert (tmp_path / "run/.hydra/hydra.yaml").exists()
    assert "train: done" in (tmp_path / "run/run.log").read_text()


def test_same_command_again_skips_everything(spray):
    spray(RUN)
    again = spray(RUN)
    assert (again.code, again.ran) == (0, [])
    assert again.out.count("up to date") == len(NAMES)


def test_where_the_command_runs_and_irrelevant_options_do_not_matter(spray, tmp_path, monkeypatch):
    spray(RUN)
    monkeypatch.chdir("/")
    assert spray(f"run_dir={tmp_path / 'run'}").ran == []


def test_changed_setting_recomputes_its_stage_and_what_follows(spray, tmp_path):
    spray(RUN)
    result = spray(RUN, "attribution=epsilon_plus")
    assert result.ran == list(NAMES[1:])
    assert "train: up to date" in result.out
    why = "attribution.composite changed from 'epsilon_plus_flat' to 'epsilon_plus'"
    assert f"attribute: recomputed because {why}" in result.out
    assert "analyze: recomputed because attribute was recomputed" in result.out
    assert "'epsilon_plus'" in (tmp_path / "run/report.json").read_text()
    assert spray(RUN, "attribution=epsilon_plus").ran == []


def test_a_key_is_exact(spray):
    spray(RUN, "model.learning_rate=0.001")
    result = spray(RUN, "model.learning_rate=0.0010000000001")
    assert "model.learning_rate changed from 0.001 to 0.0010000000001" in result.out
    assert result.ran[0] == "train"


def test_other_data_recomputes(spray, monkeypatch):
    import fakes

    spray(RUN)

    def other(options):
        train, test = fakes.tiny(options)
        train.fingerprint = "other"
        return train, test

    monkeypatch.setitem(fakes.DATASETS._parts, "tiny", other)
    assert "train: recomputed because content of dataset.train changed from" in spray(RUN).out


def test_other_checkpoint_content_recomputes(spray, tmp_path):
    import torch
    from fakes import tiny_model

    for turn, expected in (
        (0, "train: running"),
        (1, "train: recomputed because content of model.checkpoint"),
    ):
        torch.manual_seed(turn)
        torch.save(tiny_model(1, 3).state_dict(), tmp_path / "weights.pt")
        result = spray(RUN, "model.checkpoint=weights.pt")
        assert expected in result.out, turn


@pytest.mark.parametrize("damage", ["missing", "changed", "same size"])
def test_damaged_output_is_computed_again(spray, tmp_path, damage):
    spray(RUN)
    path = tmp_path / "run/attributions.h5"
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(good + b"!" if damage == "changed" else bytes([good[0] ^ 1]) + good[1:])
    result = spray(RUN)
    assert result.ran[0] == "attribute"
    what = "is missing" if damage == "missing" else "changed on disk"
    assert f"attribute: recomputed because its output attributions.h5 {what}" in result.out
    assert path.read_bytes() == good


def test_outputs_are_read_again_only_where_they_were_written_since(spray, tmp_path, monkeypatch):
    spray(RUN)
    read = []
    hashed = records.sha256
    monkeypatch.setattr(records, "sha256", lambda path: read.append(Path(path).name) or hashed(path))
    assert spray(RUN).ran == []
    assert read == []
    path = tmp_path / "run/attributions.h5"
    path.write_bytes(path.read_bytes())
    assert spray(RUN).ran == []
    assert read == ["attributions.h5"]


def test_outputs_that_a_stage_no_longer_writes_go(spray, tmp_path):
    spray(RUN, "seed=1")
    (tmp_path / "run/corrected/mine.pt").write_text("not a result of any stage")
    spray(RUN, "seed=2")
    names = {path.name for path in (tmp_path / "run/corrected").iterdir()}
    assert names == {"corrected.pt", "2.pt", "mine.pt"}
    outputs = record(tmp_path / "run")["stages"]["correct"]["outputs"]
    assert set(outputs) == {"corrected/corrected.pt", "corrected/2.pt"}


def test_failed_stage_keeps_what_was_computed(spray, tmp_path, monkeypatch):
    monkeypatch.setenv("SPRAY_FAKE_FAIL", "rank")
    result = spray(RUN)
    assert result.code == 1
    assert result.err == f"spray: error: RuntimeError: it broke in two lines; details in {tmp_path}/run/run.log\n"
    assert "Traceback" in (tmp_path / "run/run.log").read_text()
    said = record(tmp_path / "run")["stages"]
    assert [said[name]["status"] for name in NAMES] == ["done"] * 3 + ["failed"] + ["pending"] * 4
    assert "it broke" in said["rank"]["error"]
    monkeypatch.delenv("SPRAY_FAKE_FAIL")
    again = spray(RUN)
    assert again.ran == list(NAMES[3:])
    assert "rank: recomputed because it failed before" in again.out
    assert "error" not in record(tmp_path / "run")["stages"]["rank"]


def test_mistake_found_by_a_stage(spray, monkeypatch):
    monkeypatch.setenv("SPRAY_FAKE_FAIL", "rank:user")
    result = spray(RUN)
    assert (result.code, result.err) == (2, "spray: error: that cannot be done; do this\n")


def test_some_stages_only(spray):
    assert spray(RUN, "stages=[attribute,train]").ran == ["train", "attribute"]
    assert spray(RUN, "stages=[analyze]").ran == ["analyze"]
    missing = spray(RUN, "stages=[isolate]")
    assert (missing.code, missing.ran) == (2, [])
    assert "rank" in missing.err
    assert "stages=[rank,isolate]" in missing.err


def test_stage_on_stale_results_is_refused(spray):
    spray(RUN)
    result = spray(RUN, "stages=[rank]", "attribution=epsilon")
    assert (result.code, result.ran) == (2, [])
    assert "attribution.composite changed from 'epsilon_plus_flat' to 'epsilon'" in result.err
    assert "stages=[attribute,analyze,rank]" in result.err


def test_recomputing_one_stage_makes_the_following_stale(spray, tmp_path):
    spray(RUN)
    assert spray(RUN, "stages=[attribute]", "attribution=epsilon").ran == ["attribute"]
    said = record(tmp_path / "run")["stages"]
    assert said["report"]["status"] == "pending"
    assert "attribute was recomputed" in spray(RUN, "stages=[rank]", "attribution=epsilon").err
    result = spray(RUN, "attribution=epsilon")
    assert result.ran == list(NAMES[2:])
    assert "analyze: recomputed because attribute was recomputed" in result.out


def test_going_back_recomputes_too(spray, tmp_path):
    spray(RUN)
    first = (tmp_path / "run/report.json").read_text()
    spray(RUN, "stages=[attribute]", "attribution=epsilon")
    assert spray(RUN).ran == list(NAMES[1:])
    assert (tmp_path / "run/report.json").read_text() == first


def test_locked_run_directory(start, spray, tmp_path):
    holder = start(RUN, SPRAY_FAKE_SLEEP="attribute")
    wait_for(lambda: is_running(tmp_path / "run", "attribute"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    second = spray(RUN, "seed=5")
    assert (second.code, second.ran) == (2, [])
    assert second.err.startswith(f"spray: error: another spray (pid {holder.pid} on ")
    assert second.err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_kill_in_the_middle_of_a_stage(start, spray, tmp_path):
    process = start(RUN, SPRAY_FAKE_SLEEP="attribute")
    wait_for(lambda: is_running(tmp_path / "run", "attribute"))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert record(tmp_path / "run")["stages"]["attribute"]["status"] == "running"
    assert (tmp_path / "run/attributions.h5").read_text() == "half"
    result = spray(RUN)
    assert result.code == 0
    assert result.ran == list(NAMES[1:])
    assert "attribute: recomputed because it did not finish" in result.out
    assert "half" not in (tmp_path / "run/report.json").read_text()


def test_interrupt(start, tmp_path):
    process = start(RUN, SPRAY_FAKE_SLEEP="attribute")
    wait_for(lambda: is_running(tmp_path / "run", "attribute"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert record(tmp_path / "run")["stages"]["attribute"]["status"] == "failed"


def test_two_starts_at_once_never_share_a_directory(start, tmp_path):
    processes = [start("stages=[train]") for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len(list(tmp_path.glob("outputs/*/*/run.json"))) == 2


def test_damaged_record(spray, tmp_path):
    spray(RUN)
    (tmp_path / "run/run.json").write_text("{")
    result = spray(RUN)
    assert result.code == 2
    assert "run.json is damaged" in result.err


def test_plan_computes_nothing(spray, tmp_path):
    result = spray(RUN, "plan=true")
    assert (result.code, result.err, result.ran) == (0, "", [])
    assert list(tmp_path.iterdir()) == []
    for name in NAMES:
        assert f"{name:<10}would run" in result.out
    # 12 samples of 1 x 6 x 6 float32, an int64 label, 3 float32 outputs and whether it is valid, each.
    assert f"attributions.h5: {(12 * (36 * 4 + 8 + 3 * 4 + 1)) / 1000:.1f} kB" in result.out
    assert "attribution: about 0 s on cpu in batches of 12" in result.out
    assert "peak memory: about" in result.out
    assert "WARNING" not in result.out


def test_plan_warns_of_a_disk_that_is_too_small(spray, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3000))
    result = spray(RUN, "plan=true", "stages=[train,attribute]")
    assert "WARNING: 4.4 kB are needed" in result.out  # 444 bytes of weights and two times 1980


def test_plan_of_a_finished_run(spray, tmp_path):
    spray(RUN)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = spray(RUN, "plan=true", "rank.score=fisher")
    assert "attribute up to date" in result.out
    assert "rank      would run: rank.score changed from 'cross_fitted' to 'fisher'" in result.out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_plan_of_a_sweep_looks_where_the_sweep_writes(spray, tmp_path):
    spray("--multirun", "seed=0,1", "run_dir=sweep", "stages=[train]")
    result = spray("--multirun", "seed=0,1", "run_dir=sweep", "stages=[train]", "plan=true")
    assert result.code == 0
    assert result.out.count("train     up to date") == 2
