"""The command itself: help, configuration, sweeps, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spray.errors import UserError
from spray.pipelines.cli import flags_first, job_folder
from spray.pipelines.config import SprayConfig
from spray.pipelines.context import find_device
from spray.pipelines.mistakes import known_options
from spray.pipelines.stages import NAMES, in_order

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
ATTRIBUTIONS = sorted(path.stem for path in (ROOT / "conf/attribution").glob("*.yaml"))

# What is typed, and what the one line has to say.
MISTAKES = {
    "seed=abc": ["seed", "abc", "seed=0"],
    "seed=-1": ["seed=-1"],
    "model.epochs=1.5": ["model.epochs", "1.5"],
    "model.epochs=many": ["model.epochs", "many"],
    "plan=maybe": ["plan", "maybe"],
    "stages=train": ["stages", "[train,"],
    "stages=[trian]": ["trian", "did you mean 'train'", *NAMES],
    "stages=[]": ["stages=[]"],
    "sed=1": ["sed", "did you mean 'seed'"],
    "+sed=1": ["sed", "did you mean 'seed'"],
    "dataset.trian=x": ["dataset.trian", "did you mean 'dataset.train'"],
    "+dataset.trian=x": ["dataset.trian", "did you mean 'dataset.train'"],
    "dataset.plant.rat=0": ["dataset.plant.rat", "did you mean 'dataset.plant.rate'"],
    "dataset.plant.rate=2": ["dataset.plant.rate"],
    "dataset.plant.kind=tga": ["tga", "did you mean 'tag'"],
    "experiment=photo_tag": ["photo_tag", "did you mean 'photos_tag'", *EXPERIMENTS],
    "+experiment=photos_tag": ["experiment=NAME", "plus"],
    "attribution=epsilon_pluss": ["did you mean 'epsilon_plus'", *ATTRIBUTIONS],
    "attribution.method=lrq": ["lrq", "did you mean 'lrp'"],
    "attribution.composite=nope": ["nope", "epsilon_plus_flat"],
    "attribution.target=17": ["attribution.target=17", "label", "prediction"],
    "tracker=wandb": ["tracker=wandb", "tensorboard", "mlflow"],
    "attribution.dtype=float8": ["float8", "float16"],
    "attribution.batch_size=0": ["attribution.batch_size=0"],
    "compute=cloud": ["cloud", "serial"],
    "compute.name=cloud": ["cloud", "serial"],
    "model.epochs=0": ["model.epochs=0", "at least 1"],
    "model.epochs=-3": ["model.epochs=-3", "at least 1"],
    "model.batch_size=0": ["model.batch_size=0"],
    "model.learning_rate=0": ["model.learning_rate=0", "above 0"],
    "model.learning_rate=nan": ["model.learning_rate=nan"],
    "model.weight_decay=-1": ["model.weight_decay=-1"],
    "analysis.n_neighbors=0": ["analysis.n_neighbors=0"],
    "analysis.grid=0": ["analysis.grid=0"],
    "analysis.n_clusters=[]": ["analysis.n_clusters=[]", "[2,4,8]"],
    "analysis.n_clusters=[4,-2]": ["analysis.n_clusters=[4, -2]"],
    "analysis.steps=[summ]": ["analysis.steps[0]", "did you mean 'sum'", "normalize_l2"],
    "analysis.steps=[sum,{pool:0}]": ["analysis.steps[1]", "pool.size=0", "at least 1"],
    "analysis.steps=[sum,{pool:{sise:3}}]": ["sise", "did you mean 'size'"],
    "analysis.steps=[histogram,sum]": ["analysis.steps[1]=sum needs heatmaps", "put it before histogram"],
    "analysis.steps=sum": ["analysis.steps", "[sum,pool,normalize_sum]"],
    "analysis.clusterings=[dbscann]": ["analysis.clusterings[0]", "did you mean 'dbscan'", "hdbscan"],
    "analysis.clusterings=[{dbscan:{eps:0}}]": ["dbscan.eps=0", "above 0"],
    "analysis.groups=[klass]": ["klass", "class, predicted, all"],
    "analysis.groups=[all]": ["leaves out class", "rank"],
    "analysis.source=conv9": ["analysis.source=conv9", "attribution.layer=[conv9]"],
    "analysis.metric=l1": ["analysis.metric=l1", "euclidean, cosine"],
    "analysis.neighbors=some": ["analysis.neighbors=some", "exact"],
    "analysis=latent": ["analysis.source is not set", "attribution.layer=[layer3]"],
    "analysis=lattent": ["did you mean 'latent'", "anywhere"],
    "rank.score=nope": ["rank.score=nope", "cross_fitted", "fisher"],
    "isolate.candidates=-1": ["isolate.candidates=-1"],
    "isolate.n_samples=2": ["isolate.n_samples=2"],
    "report.figures=[jpg]": ["report.figures has jpg", "png, pdf"],
    "correction.epochs=0": ["correction.epochs=0"],
    "correction.learning_rate=inf": ["correction.learning_rate=inf"],
    "correction.methods=[a_clarq]": ["did you mean 'a_clarc'", "p_clarc"],
    "correction.methods=[a_clarc,a_clarc]": ["twice"],
    "verify.n_explained=0": ["verify.n_explained=0"],
    "dataset.per_class=0": ["dataset.per_class=0"],
    "dataset.mean=[nan]": ["dataset.mean", "finite"],
    "dataset.std=[inf]": ["dataset.std", "finite"],
    "device=tpu": ["device=tpu", "cuda:N"],
    "device=cuda:99": ["device=cuda:99", "device=cpu"],
    "run_dir=": ["run_dir"],
    "run_dir=null": ["run_dir"],
    "run_dir=/dev/null/x": ["/dev/null/x"],
    "dataset.train=a,b": ["dataset.train", "--multirun"],
    "model=[a": ["model=[a"],
    "just words": ["just words", "key=value"],
    "--bogus": ["--bogus", "--help"],
    "--config-dir=nowhere": ["nowhere"],
    "seed=${nothing}": ["nothing"],
    "model.name=resnet81": ["resnet81", "resnet"],
    "model.factory=nowhere.py:build": ["nowhere.py"],
    "model.checkpoint=nowhere.pt": ["nowhere.pt"],
    "dataset.name=foto": ["foto", "photos"],
    "dataset.mean=[0,0]": ["dataset.mean"],
    "dataset.std=[0]": ["dataset.std"],
}


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from spray.pipelines.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def configuration(spray, *arguments: str) -> dict:
    result = spray("--cfg", "job", *arguments, fakes_only=False)
    assert (result.code, result.err) == (0, "")
    return yaml.safe_load(result.out)


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistake_is_told_in_one_line(spray, tmp_path, typed):
    result = spray(*([] if "plant" not in typed else ["dataset.plant.kind=tag"]), typed)
    assert (result.code, result.ran, result.out) == (2, [], "")
    assert result.err.startswith("spray: error: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1
    for part in MISTAKES[typed]:
        assert part in result.err
    assert not list(tmp_path.rglob("run.json"))


def test_ready_made_analyses_differ_from_the_default_in_what_they_are_for(spray):
    plain = configuration(spray, "analysis=default")["analysis"]
    anywhere = configuration(spray, "analysis=anywhere")["analysis"]
    assert anywhere == {**plain, "steps": ["sum", "histogram"]}
    latent = configuration(spray, "analysis=latent", "analysis.source=layer3")["analysis"]
    assert latent == {**plain, "source": "layer3", "steps": ["normalize_l2"]}


def test_mistake_in_a_process_of_its_own(tmp_path):
    result = command("seed=abc", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_own_data_has_to_be_given(spray):
    result = spray("experiment=image_folder", fakes_only=False)
    assert result.code == 2
    assert result.err.startswith("spray: error: dataset.train is not set; give dataset.train=DIR")
    missing = spray("experiment=image_folder", "dataset.train=nowhere", "dataset.test=nowhere", fakes_only=False)
    assert missing.code == 2
    assert "nowhere" in missing.err


def test_help_is_for_newcomers(tmp_path):
    result = command("--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for part in (
        "Usage: spray",
        "Examples",
        "experiment=image_folder",
        "--multirun",
        "run_dir=DIR",
        *EXPERIMENTS,
    ):
        assert part in result.stdout
    assert "$" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_names_only_options_that_there_are(spray):
    text = spray("--help", fakes_only=False).out
    typed = {word.split("=")[0] for word in text.split() if "=" in word and not word.startswith(("-", "results/"))}
    assert typed - {"[key", "install"} <= {*known_options(), "experiment"}


def test_start_is_light():
    code = (
        "import sys, spray.pipelines.cli, spray.pipelines.mistakes, spray.pipelines.stages;"
        "print([m for m in ('torch', 'sklearn', 'umap', 'matplotlib', 'skimage') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_default_is_photos_tag(spray):
    assert configuration(spray) == configuration(spray, "experiment=photos_tag")
    assert configuration(spray)["dataset"]["plant"]["kind"] == "tag"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose(spray, experiment):
    config = configuration(spray, f"experiment={experiment}")
    assert set(config) == set(SprayConfig.__dataclass_fields__)
    # A project of results comes without a model.
    expected = ["attribute", "analyze", "rank", "report"] if experiment == "virelay" else list(NAMES)
    assert config["stages"] == expected


@pytest.mark.parametrize("group", ATTRIBUTIONS)
def test_attribution_groups(spray, group):
    chosen = configuration(spray, f"attribution={group}")["attribution"]
    if group == "custom":
        assert isinstance(chosen["composite"], dict)
    else:
        assert group == (chosen["composite"] if chosen["method"] == "lrp" else chosen["method"])


def test_options_win_over_the_experiment(spray):
    options = ["dataset.plant.rate=0", "dataset.plant.class=3", "model.epochs=9", "attribution.target=2"]
    config = configuration(spray, "experiment=fashion_mnist_tag", *options)
    assert (config["dataset"]["plant"]["rate"], config["dataset"]["plant"]["class"]) == (0, 3)
    assert (config["model"]["epochs"], config["attribution"]["target"]) == (9, "2")


def test_own_configuration_folder(spray, tmp_path):
    folder = tmp_path / "mine/experiment"
    folder.mkdir(parents=True)
    (folder / "my_study.yaml").write_text("# @package _global_\nseed: 12\n")
    assert configuration(spray, "--config-dir", "mine", "experiment=my_study")["seed"] == 12


def test_sweep_has_a_folder_for_each_job_and_resumes(spray, tmp_path):
    arguments = ["--multirun", "seed=0,1", "run_dir=sweep", "stages=[train,attribute]"]
    result = spray(*arguments)
    assert result.code == 0
    runs = list(tmp_path.rglob("run.json"))
    assert {path.parent.parent for path in runs} == {tmp_path / "sweep"}
    assert sorted(json.loads(path.read_text())["seed"] for path in runs) == [0, 1]
    again = spray(*arguments)
    assert (again.code, again.ran) == (0, [])
    assert spray(*arguments[:3], "stages=[analyze]").ran == ["analyze"] * 2


def test_sweep_goes_on_after_a_failed_job(spray, tmp_path):
    result = spray("--multirun", "attribution.composite=epsilon,nope,lrp_0", "run_dir=sweep")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "job attribution.composite=nope: " in result.err
    assert result.ran == [*NAMES, *NAMES]


def test_sweep_with_a_wrong_value_starts_nothing(spray):
    result = spray("--multirun", "seed=0,abc")
    assert (result.code, result.ran, result.err.count("\n")) == (2, [], 1)


def test_unexpected_error_of_a_sweep_names_its_job(spray, monkeypatch):
    monkeypatch.setenv("SPRAY_FAKE_FAIL", "train")
    result = spray("--multirun", "seed=0,1", "run_dir=sweep")
    assert result.code == 1
    assert result.err.count("\n") == result.err.count("details in") == 2
    assert "job seed=1: RuntimeError: it broke in two lines" in result.err


def test_flags_may_stand_anywhere():
    assert flags_first(["a=1", "--multirun", "b=2,3"]) == ["--multirun", "a=1", "b=2,3"]
    assert flags_first(["a=1", "--config-dir", "mine", "b=2"]) == ["--config-dir", "mine", "a=1", "b=2"]
    with pytest.raises(UserError, match="--nothing"):
        flags_first(["--nothing"])


def test_job_folder_is_a_stable_name_of_one_folder():
    assert job_folder("seed=0") == "seed=0"
    assert job_folder("a=/x/y") == job_folder("a=/x/y") != job_folder("a=_x_y")
    for overrides in ("a=/x/../y", "a=" + "z" * 500, "dataset.mean=[0,1]", "a='b c'"):
        assert "/" not in job_folder(overrides)
        assert len(job_folder(overrides)) < 200


def test_a_long_job_folder_keeps_what_is_short():
    overrides = f"dataset.train=/{'x' * 200},model.epochs=3,seed=7"
    assert job_folder(overrides).startswith("model.epochs=3,seed=7-")
    assert job_folder(overrides) != job_folder(overrides.replace("x", "y"))


def test_stage_order():
    assert in_order(["report", "train", "report"]) == ["train", "report"]


def test_devices():
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type in ("cpu", "cuda")
    for name in ("cpu:1", "cuda:x", "mps", ""):
        with pytest.raises(UserError, match="device="):
            find_device(name)
