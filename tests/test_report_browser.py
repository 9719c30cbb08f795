"""The report in a real browser, over file://: nothing is requested, names stay inert, plots and downloads work."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path

import browser
import numpy as np
import pytest
import small
import test_report as pages
import test_sweep_index as sweeps

from spray.csvs import guarded
from spray.pipelines import isolate
from spray.report import render
from spray.report.index import read_runs, render_index

pytestmark = [browser.needed, pytest.mark.slow]

LONG = "x" * 10_000
FORMULAS = ["=1+1", "=cmd|' /C calc'!A0", "+1x", "-2+3", "@SUM(1)", "\t=1", "\r=1", "'=1", "-1", "1-2", "\uff1d1"]
NAMES = [pages.HOSTILE, f"{LONG}.png", 'a,"b"\nc.png', "עברית/تجربة 😀.png", "plain.png", *FORMULAS]
MARGIN = 22  # of the plot, in scatter.js


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


def hostile() -> pages.ReportData:
    """A report whose class and file names are what an attacker, or a careless person, would choose."""
    data = pages.found(pages.HOSTILE, pages.HOSTILE)
    plot = data.embeddings[0]
    names = (*NAMES, *plot.names[len(NAMES) :])
    found = dataclasses.replace(data.artifacts[0], sample_names=(*NAMES, *data.artifacts[0].sample_names[len(NAMES) :]))
    other = dataclasses.replace(pages.embedding("c"), class_index=4, class_name=LONG)
    return dataclasses.replace(
        data, artifacts=(found, *data.artifacts[1:]), embeddings=(dataclasses.replace(plot, names=names), other)
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report #1 ü.html"
    file.write_text(render(hostile()), encoding="utf-8")
    return file


@pytest.fixture
def seen(chromium, path):
    with browser.opened(chromium, path, accept_downloads=True) as seen:
        yield seen
        seen.assert_quiet()


def place(seen, point) -> tuple[float, float]:
    """Return where in the window a point of the first plot is drawn."""
    points = hostile().embeddings[0].points
    low, high = points.min(axis=0), points.max(axis=0)
    x, y = (np.asarray(point) - low) / (high - low)
    canvas = seen.page.locator("canvas.scatter").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    # One pixel of border.
    inner = box["width"] - 2, box["height"] - 2
    return (
        box["x"] + 1 + MARGIN + x * (inner[0] - 2 * MARGIN),
        box["y"] + 1 + inner[1] - MARGIN - y * (inner[1] - 2 * MARGIN),
    )


def lasso(seen, low, high, **keys) -> None:
    """Draw a rectangle around points between two corners, in the coordinates of the points."""
    corners = [low, (high[0], low[1]), high, (low[0], high[1])]
    mouse = seen.page.mouse
    mouse.move(*place(seen, corners[0]))
    mouse.down()
    for corner in (*corners[1:], corners[0]):
        mouse.move(*place(seen, corner), steps=4)
    mouse.up()


def inside(low, high) -> list[int]:
    points = hostile().embeddings[0].points
    return np.flatnonzero(((points > low) & (points < high)).all(axis=1)).tolist()


def saved(seen, button) -> str:
    with seen.page.expect_download() as download:
        button.click()
    return Path(download.value.path()).read_bytes().decode()


def valid(name: str) -> str:
    """Return a name as a page can hold it: what is no valid UTF-8 becomes the replacement character."""
    return "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in name)


def in_csv(name: str) -> str:
    """Return a name as a CSV holds it, where it is no formula."""
    return guarded(valid(name))


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_opens_quietly_at_every_width_and_nothing_sticks_out(chromium, path, width, scheme):
    with browser.opened(chromium, path, width, color_scheme=scheme) as seen:
        seen.page.wait_for_timeout(200)
        seen.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        seen.page.wait_for_timeout(300)
        assert seen.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert "owned" not in seen.page.title()
        assert seen.page.locator("img[src='x']").count() == 0
        assert seen.page.locator("canvas.scatter").first.evaluate("c => c.width") > 200
        ink, paper = (
            seen.page.evaluate(f"getComputedStyle(document.body).{name}").strip("rgb()").split(",")
            for name in ("color", "backgroundColor")
        )
        assert (int(ink[0]) > int(paper[0])) == (scheme == "dark")
        pictures = seen.page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert pictures
        seen.assert_quiet()


def test_pointing_at_a_sample_shows_its_own_thumbnail(seen):
    plot = hostile().embeddings[0]
    # One that stands alone, so that no other is nearer.
    distances = np.linalg.norm(plot.points[:, None] - plot.points[None], axis=-1) + 9.0 * np.eye(len(plot.points))
    alone = int(distances.min(axis=1).argmax())
    tip = seen.page.locator(".tip").first
    assert tip.is_hidden()
    seen.page.mouse.move(*place(seen, plot.points[alone]))
    assert tip.is_visible()
    assert tip.locator("bdi").inner_text() == plot.names[alone]
    assert f"sample {plot.indices[alone]}, cluster {plot.clusters[alone]}" in tip.locator("span").inner_text()
    seen.page.wait_for_timeout(200)
    drawn = tip.locator("canvas").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].concat([c.width, c.height])"
    )
    width, height = drawn[-2:]
    pixels = np.array(drawn[:-2]).reshape(height, width, 4)[..., :3]
    own = plot.thumbnails[alone].astype(float)
    assert pixels.shape == own.shape
    # The picture is compressed; another sample's would be off by much more.
    assert np.abs(pixels - own).mean() < 12 < np.abs(pixels - plot.thumbnails[alone - 1].astype(float)).mean()
    seen.page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_lasso_selects_and_the_selection_is_saved(seen):
    plot = hostile().embeddings[0]
    low, high = (2.2, 0.0), (4.4, 2.1)
    expected = inside(low, high)
    assert 10 < len(expected) < len(plot.names)
    lasso(seen, low, high)
    status = seen.page.locator(".selection [role=status]").first
    carrying = int(plot.members[expected].sum())
    assert (
        status.inner_text()
        == f"{len(expected)} samples of {len(plot.names)} selected, {carrying} of them with the artifact"
    )
    assert seen.page.locator(".thumbs").first.locator("canvas").count() == 24
    rows = rows_of(saved(seen, seen.page.locator("[data-do=csv]").first))
    assert [int(row["sample_index"]) for row in rows] == plot.indices[expected].tolist()
    assert [row["name"] for row in rows] == [in_csv(plot.names[i]) for i in expected]
    assert [int(row["cluster: kmeans-04"]) for row in rows] == plot.clusters[expected].tolist()
    assert [int(row["artifact"]) for row in rows] == plot.members[expected].astype(int).tolist()
    scores = plot.scores["artifact score of a1"][expected]
    assert [float(row["artifact score of a1"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-5)
    as_json = json.loads(saved(seen, seen.page.locator("[data-do=json]").first))
    assert [row["sample_index"] for row in as_json] == [int(row["sample_index"]) for row in rows]
    seen.page.locator("[data-do=clear]").first.click()
    assert "No sample selected" in status.inner_text()
    assert seen.page.locator("[data-do=csv]").first.is_disabled()


def test_shift_adds_to_the_selection(seen):
    first, second = inside((-1.0, -1.0), (1.0, 1.0)), inside((3.0, 3.0), (5.5, 5.5))
    lasso(seen, (-1.0, -1.0), (1.0, 1.0))
    seen.page.keyboard.down("Shift")
    lasso(seen, (3.0, 3.0), (5.5, 5.5))
    seen.page.keyboard.up("Shift")
    said = seen.page.locator(".selection [role=status]").first.inner_text()
    assert said.startswith(f"{len(first) + len(second)} samples")


def test_hostile_names_are_saved_as_they_are_but_no_formulas(seen):
    assert [name for name in FORMULAS if guarded(name) == name] == ["-1", "1-2"]
    seen.page.locator("[data-do=shown]").first.click()
    rows = rows_of(saved(seen, seen.page.locator("[data-do=csv]").first))
    assert [row["name"] for row in rows[: len(NAMES)]] == [in_csv(name) for name in NAMES]
    as_json = json.loads(saved(seen, seen.page.locator("[data-do=json]").first))
    assert [row["name"] for row in as_json[: len(NAMES)]] == NAMES


def test_the_ranking_is_saved(seen):
    data = hostile()
    rows = rows_of(saved(seen, seen.page.locator("button[data-table][data-format=csv]")))
    assert [row["row"] for row in rows] == ["class"] * 3 + ["cluster"] * 14
    assert [row["class"] for row in rows] == [in_csv(row.class_name) for row in (*data.classes, *data.clusters)]
    assert [row["cluster"] for row in rows[3:]] == [row.cluster for row in data.clusters]
    separability = [row.separability for row in (*data.classes, *data.clusters)]
    assert [float(row["separability"]) for row in rows] == pytest.approx(separability, rel=1e-5)
    assert [row["artifact"] for row in rows[:2]] == ["1", "0"]
    as_json = json.loads(saved(seen, seen.page.locator("button[data-table][data-format=json]")))
    assert as_json[0]["class"] == pages.HOSTILE
    assert as_json[0]["p_value"] == 0.001
    assert as_json[0]["q_value"] is None


def test_samples_of_an_artifact_are_saved(seen):
    found = hostile().artifacts[0]
    rows = rows_of(saved(seen, seen.page.locator("button[data-format=csv]").first))
    assert [int(row["sample_index"]) for row in rows] == list(found.samples)
    assert [row["name"] for row in rows] == [in_csv(name) for name in found.sample_names]
    as_json = json.loads(saved(seen, seen.page.locator("button[data-format=json]").first))
    assert [row["sample_index"] for row in as_json] == list(found.samples)


def test_everything_works_with_the_keyboard_alone(seen):
    page, plot = seen.page, hostile().embeddings[0]
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('canvas.scatter')"):
            break
    assert page.evaluate("document.activeElement.matches('canvas.scatter')")
    said, status = page.locator("[data-role=said]").first, page.locator(".selection [role=status]").first
    page.keyboard.press("ArrowRight")
    before = said.inner_text()
    assert "sample " in before
    page.keyboard.press("ArrowRight")
    assert said.inner_text() != before
    page.keyboard.press("Enter")
    assert status.inner_text().startswith("1 sample of")
    page.keyboard.press("+")
    assert status.inner_text().startswith("6 samples")
    page.keyboard.press("Enter")
    assert status.inner_text().startswith("5 samples")
    page.keyboard.press("a")
    assert status.inner_text().startswith(f"{len(plot.names)} samples")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert "No sample selected" in status.inner_text()
    # From the plot on with Tab: a group of the legend, then all that are shown, then the file.
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.do") == "shown":
            break
    page.keyboard.press("Enter")
    size = int((plot.clusters == 0).sum())
    assert status.inner_text().startswith(f"{size} samples")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert len(rows_of(Path(download.value.path()).read_text(encoding="utf-8"))) == size


def test_points_are_coloured_by_cluster_score_or_prediction(seen):
    panel = seen.page.locator(".panel").first
    choice, legend = panel.locator("select"), panel.locator(".legend")
    offered = choice.locator("option").all_inner_texts()
    assert offered == ["cluster: kmeans-04", "cluster: kmeans-02", "artifact score of a1", "prediction"]
    looks = []
    for name in offered:
        choice.select_option(label=name)
        looks.append((legend.inner_text(), panel.locator("canvas.scatter").evaluate("c => c.toDataURL()")))
    assert len({text for text, _ in looks}) == len({picture for _, picture in looks}) == len(offered)
    plot = hostile().embeddings[0]
    wrong = int((plot.predictions == 5).sum())
    assert f"predicted class 5 · {wrong}" in looks[3][0]
    assert f"artifact · {plot.members.sum()}" in looks[2][0]


def test_a_finger_taps_and_draws_after_the_button(chromium, path):
    with browser.opened(chromium, path, 390, has_touch=True, is_mobile=True) as seen:
        seen.page.wait_for_timeout(200)
        seen.page.touchscreen.tap(*place(seen, hostile().embeddings[0].points[40]))
        assert seen.page.locator(".tip").first.is_visible()
        canvas = seen.page.locator("canvas.scatter").first
        assert canvas.evaluate("c => getComputedStyle(c).touchAction") == "manipulation", "the page still scrolls"
        seen.page.locator("[data-do=lasso]").first.tap()
        assert canvas.evaluate("c => getComputedStyle(c).touchAction") == "none"
        seen.assert_quiet()


def test_other_classes_open_when_asked(seen):
    second = seen.page.locator(".panel").nth(1)
    assert not second.locator("canvas.scatter").is_visible()
    second.locator("summary").first.click()
    seen.page.wait_for_timeout(200)
    assert second.locator(".legend button").count() > 2


def test_print_is_light_and_without_controls(chromium, path):
    with browser.opened(chromium, path, color_scheme="dark") as seen:
        seen.page.wait_for_timeout(200)
        seen.page.emulate_media(media="print", color_scheme="dark")
        assert seen.page.locator(".toolbar").first.is_hidden()
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 248)"
        assert len(seen.page.pdf(format="A4")) > 50_000
        seen.assert_quiet()


def test_without_its_script_everything_but_the_plots_is_there(chromium, path):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert "Backdoor" in page.locator("h1").inner_text()
    assert "switched off" in page.locator("noscript").first.inner_text()
    context.close()


def test_policy_stops_what_is_put_into_the_page(chromium, path, tmp_path):
    """Were a name to slip through, the page's policy would be the second wall."""
    changed = tmp_path / "changed.html"
    put = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><main>"
    changed.write_text(path.read_text(encoding="utf-8").replace("<main>", put, 1), encoding="utf-8")
    with browser.opened(chromium, changed) as seen:
        seen.page.wait_for_timeout(200)
        assert seen.page.title() != "owned"
        assert any("Content Security Policy" in error for error in seen.errors)


def test_sprite_of_a_class_holds_its_thumbnails_in_order(path):
    """What the script cuts out of the picture: tile i is thumbnail i."""
    from PIL import Image

    from spray.report.pictures import sprite

    thumbnails = np.zeros((7, 16, 12, 3), np.uint8)
    thumbnails += (30 * np.arange(7, dtype=np.uint8))[:, None, None, None]
    uri, columns, width, height = sprite(thumbnails, size=8, quality=90)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
    assert (columns, width, height) == (3, 6, 8)
    for i in range(7):
        row, column = divmod(i, columns)
        part = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert abs(part.mean() - 30 * i) < 6


def no_memory(context):
    raise MemoryError("no room")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Real runs of the command: one that finds what is planted, one of clean images, one that fails on its way."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = (
        dict.fromkeys(("coffee", "skin", "stone"), small.TRAIN),
        dict.fromkeys(("coffee", "skin", "stone"), small.TEST),
    )
    file = small.write_model(folder)
    options = [
        *small.write_images(folder, *sizes),
        *("experiment=image_folder", f"dataset.image_size={small.SIDE}", "device=cpu", "verify.recheck=false"),
        *("model.epochs=30", "model.learning_rate=5e-3", "model.batch_size=16", "correction.epochs=6"),
    ]
    plant = ["dataset.plant.kind=box", "dataset.plant.class=skin", "dataset.plant.rate=0.4", "dataset.plant.size=5"]
    found = small.run(*options, *plant, f"model.factory={file}:build", f"run_dir={folder / 'found'}")
    clean = small.run(*options, f"model.factory={file}:build", f"run_dir={folder / 'clean'}")
    shutil.copytree(folder / "found", folder / "failed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolate, "STAGE", dataclasses.replace(isolate.STAGE, run=no_memory))
        failed = small.run(*options, *plant, "seed=1", f"model.factory={file}:build", f"run_dir={folder / 'failed'}")
    assert [found.code, clean.code] == [0, 0]
    assert failed.code == 1
    assert "MemoryError: no room" in failed.err
    assert f"report of what was done before: {folder / 'failed' / 'report.html'}" in failed.out
    return folder


@pytest.mark.parametrize(
    ("name", "heading", "not_said"),
    [
        ("found", "skin: it turns", "No verdict"),
        ("clean", "No artifact was found that passed the causal test.", "Clever Hans in class"),
        # Its folder holds what an earlier run with another seed had found.
        ("failed", "No verdict: the run failed in stage isolate.", "Clever Hans in class"),
    ],
)
def test_reports_of_real_runs_are_right(chromium, runs, name, heading, not_said):
    with browser.opened(chromium, runs / name / "report.html", 390) as seen:
        seen.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        seen.page.wait_for_timeout(300)
        assert heading in seen.page.locator("h1").inner_text()
        text = seen.page.locator("main").inner_text()
        assert not_said not in text.replace(seen.page.locator("pre").inner_text(), "")
        assert seen.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        failed = name == "failed"
        assert ("This run is incomplete." in text) == failed
        lights = seen.page.locator(".lights .light")
        assert lights.count() == 3
        reds = seen.page.locator(".lights .red b").all_inner_texts()
        assert "skin" in reds if name == "found" else not reds
        assert seen.page.locator(".lights .none").count() == (3 if failed else 0)
        assert seen.page.locator("canvas.scatter").count() == 3
        if failed:
            assert "isolate failed: MemoryError: no room; correct is out of date" in text
            assert "Not run: the isolate stage" in text
            assert "turned, control" not in text
            assert seen.page.locator("article.artifact").count() == 0
        seen.assert_quiet()


def test_files_of_a_real_run_agree_with_its_report(chromium, runs):
    with browser.opened(chromium, runs / "found" / "report.html", accept_downloads=True) as seen:
        artifact = json.loads((runs / "found" / "artifacts.json").read_text())["artifacts"][0]
        rows = rows_of(saved(seen, seen.page.locator("button[data-format=csv]").first))
        assert [int(row["sample_index"]) for row in rows] == artifact["samples"]
        scores = dict(csv.reader((runs / "found" / artifact["scores"]).open()))
        for row in rows:
            assert float(row["score"]) == pytest.approx(float(scores[row["sample_index"]]), rel=1e-5)
            assert (runs / "train" / row["name"]).is_file(), "names are the paths of the images"
        seen.assert_quiet()
    figures = {path.name for path in (runs / "found" / "figures").iterdir()}
    assert {"ranking.png", "accuracies.pdf", "artifacts.png", "causal_effects.pdf"} <= figures


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_many_settings_and_long_names_leave_the_page_of_a_sweep_readable(chromium, tmp_path, width):
    """Names of folders hold what runs were given: hundreds of characters, and many settings that differ."""
    for seed in (0, 1):
        given = [f"seed={seed}", *(f"dataset.options.key_{i}={'/long/path' * 12}_{seed}{i}" for i in range(14))]
        sweeps.write_run(tmp_path, ",".join(given).replace("/", "-")[:240], given, class_name="motorcycle, " * 30)
    file = tmp_path / "index.html"
    file.write_text(render_index(tmp_path, read_runs(tmp_path)), encoding="utf-8")
    with browser.opened(chromium, file, width) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        # The verdict is seen without scrolling sideways, and a run takes less than two screens.
        right = seen.page.locator(".runs .state").first.evaluate("e => e.getBoundingClientRect().right")
        assert right <= width
        assert seen.page.locator(".runs tbody tr").first.evaluate("e => e.offsetHeight") < 1600
        hidden = seen.page.locator(".further-cell details").first
        assert hidden.locator("summary").inner_text() == "11 more"
        hidden.locator("summary").click()
        assert "dataset.options.key_13" in hidden.inner_text()
        assert seen.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        seen.assert_quiet()


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_page_of_a_sweep_opens_quietly_and_leads_to_the_reports(chromium, tmp_path, width):
    name = "seed=0,a=" + "b" * 120
    sweeps.write_run(tmp_path, name, ["seed=0", f"dataset.train={'/long' * 40}"], class_name=pages.HOSTILE)
    sweeps.write_run(tmp_path, "seed=1", ["seed=1", "dataset.train=<i>x"], analyze="failed", isolate="pending")
    file = tmp_path / "index.html"
    file.write_text(render_index(tmp_path, read_runs(tmp_path)), encoding="utf-8")
    with browser.opened(chromium, file, width, color_scheme="dark") as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert "1 of 2 runs found an artifact, 1 failed." in seen.page.locator("h1").inner_text()
        seen.assert_quiet()
        seen.page.get_by_role("link", name="Run 1").click()
        assert seen.page.url == (tmp_path / name / "report.html").as_uri()
