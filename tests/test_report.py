"""The report's page: what it says, that hostile names stay inert, that it stands alone."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from spray.report import ReportData, render
from spray.report.data import (
    PASSED,
    Artifact,
    Chosen,
    Embedding,
    Gallery,
    KindOfSample,
    Light,
    ModelResult,
    RankRow,
    Recheck,
    Share,
    StageRow,
    Tile,
    Truth,
    match_truth,
)
from spray.report.pictures import thumbnail
from spray.report.render import best_correction
from spray.report.words import VERDICTS, duration, interval, left_sentence, number, p_value, percent, verdict_name

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> '\"`{{ 7*7 }} \u202egnp.\u202c 😀\udcff"


def share(value: float, n: int = 900) -> Share:
    half = 1.96 * (value * (1 - value) / n) ** 0.5
    return Share(value, max(0.0, value - half), min(1.0, value + half))


def photo(rng: np.random.Generator, tagged: bool, size: int = 32) -> np.ndarray:
    ramp = np.linspace(0, 1, size)
    waves = [np.sin(ramp[:, None] * rng.uniform(2, 9) + ramp * rng.uniform(2, 9) + c) for c in range(3)]
    image = 0.5 + 0.35 * np.stack(waves)
    if tagged:
        image[:, 2:8, 2:8] = np.array([1.0, 0.85, 0.1])[:, None, None]
    return image


def tile(rng: np.random.Generator, index: int, name: str, tagged: bool) -> Tile:
    relevance = rng.normal(scale=0.04, size=(32, 32))
    relevance[2:8, 2:8] += 0.4 * tagged
    return Tile(name, index, photo(rng, tagged), relevance, score=float(tagged) + rng.normal() / 9)


def artifact(name: str, identity: str = "a1", verdict: str = "backdoor", class_index: int = 3) -> Artifact:
    rng = np.random.default_rng(5)
    pattern = np.zeros((32, 32, 4), dtype=np.uint8)
    pattern[2:8, 2:8] = (255, 217, 26, 255)
    groups = (
        Gallery(
            "Top members",
            "highest artifact score",
            tuple(tile(rng, i, f"{name}/{i}.png", True) for i in range(6)),
        ),
        Gallery(
            "Random members",
            "drawn at random",
            tuple(tile(rng, 50 + i, f"{name}/5{i}.png", True) for i in range(3)),
        ),
        Gallery(
            "Near misses",
            "highest score outside",
            tuple(tile(rng, 90 + i, f"{name}/9{i}.png", False) for i in range(3)),
        ),
    )
    return Artifact(
        id=identity,
        class_index=class_index,
        class_name=name,
        verdict=verdict,
        cluster="kmeans-03/1",
        flip_rate=0.874,
        control_flip_rate=0.021,
        p_value=2e-4,
        logit_gain=7.31,
        n_tested=240,
        samples=tuple(range(118)),
        sample_names=tuple(f"{name}/{i:05d}.png" for i in range(118)),
        pattern=pattern,
        mask=pattern[..., 3],
        galleries=groups if verdict != "no_effect" else (),
        limit=0.31,
    )


def embedding(name: str, n: int = 400) -> Embedding:
    rng = np.random.default_rng(7)
    clusters = rng.integers(0, 4, n)
    points = np.array([(0, 0), (3, 1), (1, 4), (4, 4)])[clusters] + rng.normal(scale=0.5, size=(n, 2))
    return Embedding(
        class_index=3,
        class_name=name,
        kind="UMAP",
        clustering="kmeans-04",
        points=points,
        clusterings={"kmeans-02": clusters % 2, "kmeans-04": clusters},
        scores={"artifact score of a1": np.where(clusters == 1, 0.9, 0.1) + rng.normal(scale=0.01, size=n)},
        predictions=np.where(np.arange(n) % 9 == 0, 5, 3),
        members=clusters == 1,
        indices=np.arange(n),
        names=tuple(f"{name}/{i}.png" for i in range(n)),
        thumbnails=np.stack(
            [(255 * photo(rng, clusters[i] == 1)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0) for i in range(n)]
        ),
        eigenvalues=np.array([0, 0.03, 0.05, 0.07, 0.31, 0.38, 0.41, 0.46, 0.5, 0.52, 0.55, 0.56]),
        total=900,
    )


def results(name: str, clean: float, attacked: float) -> ModelResult:
    return ModelResult(
        name=name,
        n=900,
        clean=share(clean),
        attacked=share(attacked),
        attacked_to_class=share(1 - attacked),
        artifact_relevance=share(0.6 * (1 - attacked)),
        worst_class=share(clean - 0.08),
        planted_attacked=share(max(0.0, attacked - 0.02)),
        planted_to_class=share(1 - attacked),
    )


def found(name: str = "striped coffee", files: str | None = None) -> ReportData:
    rejected = dataclasses.replace(
        artifact("gravel", "a2", "no_effect", 5), flip_rate=0.02, control_flip_rate=0.03, p_value=0.61
    )
    return ReportData(
        title="photos_tag",
        model="small_cnn",
        n_train=9000,
        n_classes=10,
        artifacts=(artifact(name), rejected),
        models=(
            results("original", 0.952, 0.183),
            results("fine_tuned", 0.955, 0.241),
            results("a_clarc", 0.949, 0.921),
            results("p_clarc", 0.931, 0.858),
        ),
        truths=(Truth(3, name, "tag", 0.12, frozenset(range(10, 120))),),
        class_names=tuple(name if c == 3 else f"class {c}" for c in range(10)),
        lights=(Light(3, name, "red", "Backdoor"), Light(0, "cat", "green", "q 0.50; nothing to test")),
        embeddings=(embedding(name),),
        classes=tuple(
            RankRow(i + 1, c, 900, 40.2 / (i + 1), min(0.001 * 9**i, 0.9), None, i == 0)
            for i, c in enumerate((name, "cat", "moon"))
        ),
        clusters=tuple(
            RankRow(i + 1, name, 118 + i, 31.0 / (i + 1), min(0.001 * 4**i, 0.9), f"kmeans-03/{i}", i == 0)
            for i in range(14)
        ),
        caveats=("Tidy clusters do not mean a right finding.", "One seed."),
        provenance=(
            ("Command", f"spray experiment={files or 'photos_tag'}"),
            ("Seed", "0"),
            ("Device", "cpu"),
        ),
        versions=(("python", "3.11.7"), ("torch", "2.14.0")),
        stages=(
            StageRow("train", "done", 71.2, (("accuracy", "0.95"),)),
            StageRow("attribute", "done", 3671.0),
        ),
        skipped_samples=(f"{files or 'broken'}.png",),
    )


def clean() -> ReportData:
    rejected = dataclasses.replace(artifact("gravel", "a1", "no_effect"), flip_rate=0.02, p_value=0.61)
    return dataclasses.replace(found(), artifacts=(rejected,), models=(), truths=(), skipped_samples=())


def partial() -> ReportData:
    return ReportData(title="mine", model="resnet18", n_train=100, n_classes=2, stages=(StageRow("train", "done"),))


class Page(HTMLParser):
    """What a browser sees: tags with attributes, text, the bodies of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside != "style":
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.mark.parametrize(
    "data",
    [found(), found(HOSTILE, HOSTILE), clean(), partial()],
    ids=["found", "hostile", "clean", "partial"],
)
def test_page_stands_alone_and_is_light(data):
    html = render(data)
    assert len(html.encode()) < 5_000_000
    page = Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|innerHTML", html)


def test_policy_allows_the_one_script_by_its_hash():
    page = Page(render(found(HOSTILE, HOSTILE)))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    code = [body for attributes, body in page.scripts if attributes.get("type") != "application/json"]
    assert len(code) == 1
    digest = base64.b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy.split("script-src")[1]


def test_hostile_names_add_no_markup_and_are_shown_as_they_are():
    tame, hostile = Page(render(found("tame", "tame"))), Page(render(found(HOSTILE, HOSTILE)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in tame.tags]
    assert "{{ 7*7 }}" in hostile.text
    assert "<img src=x" in hostile.text


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            found(),
            "Backdoor in class striped coffee: it turns 87 % of other images into this class, a control patch 2 %.",
        ),
        (clean(), "No artifact was found that passed the causal test."),
        (partial(), "No verdict yet"),
    ],
)
def test_verdict_comes_first(data, sentence):
    page = Page(render(data))
    assert sentence in page.words().replace("\u202f", " ")
    assert sentence[:10] in page.words()[:260]


def test_clean_model_lists_what_was_tested():
    words = Page(render(clean())).words()
    assert "1 candidate was isolated" in words
    assert "gravel" in words
    assert "Tested, not found" in words


def test_what_moved_predictions_but_is_no_finding_is_not_said_to_have_moved_none():
    def words(**changes):
        row = dataclasses.replace(clean().artifacts[0], **changes)
        return Page(render(dataclasses.replace(clean(), artifacts=(row,)))).words()

    none = "None moved predictions reliably more than its control."
    assert none in words(p_value=0.61)
    assert none in words(p_value=0.001, flip_rate=0.01, control_flip_rate=0.02)
    moved = words(p_value=1e-13, flip_rate=0.235, control_flip_rate=0.083, unusual=False)
    assert none not in moved
    assert "None passed; why is said of each." in moved
    assert "its samples are an ordinary kind of image" in moved
    assert "moves few predictions more than its control" in words(
        p_value=0.001, flip_rate=0.05, control_flip_rate=0.01, unusual=True
    )
    much = {"p_value": 0.001, "flip_rate": 0.9, "control_flip_rate": 0.0, "unusual": True}
    assert "but the class's own images do without it" in words(**much, removal_p_value=0.4)
    assert "but is not all that sets its samples apart" in words(**much, removal_p_value=1e-8)


def left(*verdicts: str) -> str:
    rows = tuple(Recheck(f"a0{i}", "moon", verdict) for i, verdict in enumerate(verdicts, start=1))
    page = Page(render(dataclasses.replace(found(), rechecks=rows)))
    (said,) = [line for line in [left_sentence(rows)] if line in page.words()]
    return said


def test_lead_says_what_still_acts_in_the_corrected_model():
    assert left("gone", "gone").endswith("any more; no cluster of its samples stands out.")
    # A group of samples that stays is no artifact that acts.
    assert left("no_effect") == (
        "Nothing that was found acts on the corrected model any more, though the samples of a01 still form "
        "a cluster there."
    )
    assert "any more, though the samples of a02 and a03 still form" in left("gone", "no_effect", "no_effect")
    assert left("left") == "a01 still acts on the corrected model."
    assert left("left", "gone") == "a01 still acts on the corrected model; the other does not."
    assert (
        left("no_effect", "left", "left", "gone") == "a02 and a03 still act on the corrected model; the others do not."
    )
    assert left("unheard of", "gone") == "What is left of each artifact in the corrected model is listed below."
    assert left(*["left"] * 9).startswith("a01, a02, a03, a04, a05, a06 and 3 more still act")
    assert left_sentence(()) == ""


def test_lead_does_not_say_that_nothing_acts_where_accuracy_is_lost():
    rows = (Recheck("a01", "moon", "gone"),)
    model = ModelResult("p_clarc", clean=Share(0.667, 0.541, 0.773), attacked=Share(0.35, 0.22, 0.505))
    said = left_sentence(rows, model)
    assert "still loses accuracy" in said
    assert "acts on" not in said
    same = dataclasses.replace(model, attacked=Share(0.6, 0.48, 0.71))
    for sure in (same, dataclasses.replace(model, attacked=None), dataclasses.replace(model, clean=Share(0.667)), None):
        assert left_sentence(rows, sure).startswith("Nothing that was found acts on")
    page = Page(render(dataclasses.replace(found(), rechecks=rows, models=(model,), chosen=Chosen("p_clarc", "why"))))
    assert said in page.words()


def test_missing_stages_are_named():
    words = Page(render(partial())).words()
    for stage in ("verify", "isolate", "analyze", "rank"):
        assert f"Not run: the {stage} stage" in words


def test_intervals_truth_and_p_value_are_stated():
    words = Page(render(found())).words().replace("\u202f", " ")
    assert "18.3 %" in words
    assert "15.8 – 20.8" in words.replace("\u2009", " ")
    assert "Known, because it was planted" in words
    assert "91.5 % of its samples" in words  # 108 of 118
    assert "98.2 % of those that do" in words  # 108 of 110
    assert "< 0.001" in words


def test_several_findings_are_counted():
    both = (artifact("moon"), artifact("rocket", "a2", "clever_hans", 4))
    words = Page(render(dataclasses.replace(found(), artifacts=both))).words()
    assert "2 artifacts were found, the strongest in moon" in words


def test_missed_truth_is_said():
    truth = Truth(8, "moon", "tag", 0.1, frozenset({1}))
    assert "It was missed" in Page(render(dataclasses.replace(found(), truths=(truth,)))).words()
    assert match_truth(truth, found().found).artifact is None


def test_controls_are_no_corrections():
    assert best_correction(found().models).name == "a_clarc"
    assert best_correction(found().models[:2]) is None
    assert best_correction(None) is None


def test_the_gap_of_the_chart_is_the_analysis_own():
    from spray.report.plots import HEIGHT, eigen_chart

    chart = eigen_chart(np.array([0.0, 0.02, 0.05, 0.6, 0.7]))
    assert chart.groups == 3
    x = [dot[0] for dot in chart.dots]
    assert x[2] < chart.gap_x < x[3]
    assert chart.gap == (chart.dots[3][1], chart.dots[2][1]), "from the value after the gap to that before it"
    assert [value for _, value in chart.ticks] == [0.0, 0.5, 1.0]
    assert all(0 <= y <= HEIGHT for _, y, _ in chart.dots)
    assert eigen_chart(np.array([0.0])) is None
    assert eigen_chart(np.zeros(3)).ticks[-1][1] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(Share(0.1234)), "12.3 %"),
        (percent(None), "–"),
        (interval(Share(0.5)), ""),
        (p_value(0.0), "< 0.001"),
        (p_value(0.0123), "0.012"),
        (p_value(0.6149), "0.61"),
        (number(12345), "12 345"),
        (number(-0.01234), "−0.0123"),
        (duration(3671), "1 h 1 min"),
        (duration(75), "1 min 15 s"),
        (duration(4.25), "4.2 s"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text.replace("\u202f", " ") == expected


def test_every_verdict_has_one_name():
    assert set(PASSED) < set(VERDICTS)
    assert verdict_name("clever_hans") == "Clever Hans"
    assert verdict_name("backdoor") == "Backdoor"
    assert verdict_name("<unknown>") == "<unknown>"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.slow
def test_browser_runs_the_script_and_nothing_else(tmp_path):
    (tmp_path / "report.html").write_text(render(found(HOSTILE, HOSTILE)), encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    assert "<title>owned</title>" not in done.stdout
    canvas = re.search(r"<canvas class=\"scatter\"[^>]*>", done.stdout).group()
    assert re.search(r'width="[1-9]\d\d', canvas)  # the script sized it


def test_a_thousand_classes_are_summed_up():
    names = tuple(f"class {c}" for c in range(1000))
    lights = (Light(3, "class 3", "red", "Backdoor"), *(Light(c, names[c], "green", "q 0.9") for c in range(900)))
    rows = tuple(RankRow(c + 1, name, 9, 1.0, 0.5, class_index=c, q_value=0.9) for c, name in enumerate(names))
    data = dataclasses.replace(found(), n_classes=1000, lights=lights, classes=rows, without_plot=names[60:])
    page = Page(render(data))
    words = page.words()
    assert "artifact found: 1 nothing found: 900" in words
    assert "900 classes in which nothing was found" in words
    assert "and 920 more classes" in words
    assert "By the ranking alone 1 000 of 1 000 classes would not stand out" in words
    assert [tag for tag, _ in page.tags].count("tr") < 400


def test_a_very_large_finding_is_listed_by_its_best():
    n = 30_000
    large = dataclasses.replace(
        artifact("c"), samples=tuple(range(n)), sample_names=("x.png",) * n, scores=tuple(i % 97 / 97 for i in range(n))
    )
    page = Page(render(dataclasses.replace(found(), artifacts=(large,))))
    listed = next(json.loads(body) for attributes, body in page.scripts if attributes.get("id") == "samples-1")
    assert len(listed["samples"]) == len(listed["names"]) == 20_000
    assert min(listed["scores"]) >= 30 / 97
    assert listed["samples"] == sorted(listed["samples"])
    assert "the 20 000 best" in page.words()


def test_a_kind_of_sample_is_no_red_light_and_no_backdoor():
    bias = dataclasses.replace(artifact("moon", verdict="sample_bias"), kind="sample", flip_rate=None)
    words = Page(render(dataclasses.replace(found(), artifacts=(bias,), models=()))).words()
    assert "Sample bias in class moon" in words
    assert "turns – of other images" not in words
    known = dataclasses.replace(bias, bias=KindOfSample(0.06, 0.993, 1e-9, held_out=True))
    words = Page(render(dataclasses.replace(found(), artifacts=(known,), models=()))).words()
    assert "the model is right on 6 % of a kind of its samples, on 99 % of the rest" in words
    assert "Test images of moon that the model gets right" in words
    assert "99.3 %" in words


def test_many_findings_in_large_noisy_images_stay_light():
    """Noise compresses worst; artifacts, samples and points are the most that are gathered."""
    rng = np.random.default_rng(3)
    tiles = tuple(Tile("n", i, rng.random((3, 224, 224)), rng.normal(size=(224, 224))) for i in range(21))
    pattern = rng.integers(0, 256, (224, 224, 4), dtype=np.uint8)
    many = dataclasses.replace(
        artifact("c"), galleries=(Gallery("g", "n", tiles),), pattern=pattern, mask=pattern[..., 0]
    )
    thumbnails = np.stack([thumbnail(rng.random((3, 224, 224))) for _ in range(400)])
    plot = dataclasses.replace(embedding("c"), thumbnails=thumbnails)
    page = render(dataclasses.replace(found(), artifacts=(many,) * 4, embeddings=(plot,) * 4))
    assert len(page) < 5_000_000
