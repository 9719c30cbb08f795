"""FolderDataset: order and resizing as torchvision's, every mode and format, damaged files, refusals."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from spray.data.decoding import UnreadableImageError, decode
from spray.data.folder import FolderDataset
from spray.errors import UserError


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth coloured picture, so that interpolation and JPEG change it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def constant(path: Path, size: int = 4) -> list[float]:
    """The colour of the file's middle pixel."""
    return decode(path, size)[:, size // 2, size // 2].tolist()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes whose files try the order: digits, cases, nested and hidden folders, other extensions."""
    names = [
        "b/10.png",
        "b/9.png",
        "b/Z.PNG",
        "b/a.png",
        "b/a/x.png",
        "b/a-b/y.png",
        "b/.hidden.png",
        "b/.d/h.png",
    ]
    names += ["A/1.jpeg", "A/2.JPG", "A/3.bmp", "A/4.tif", "A/5.tiff", "A/6.webp", "A/7.ppm", "A/ü.png"]
    for seed, name in enumerate(names):
        save(tmp_path / name, picture(seed=seed))
    (tmp_path / "A/notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no class")
    return tmp_path


def test_classes_labels_and_order_are_image_folders(tree: Path) -> None:
    os.symlink(tree / "b" / "a", tree / "b" / "link")
    os.symlink(tree / "A", tree / "c")
    data, oracle = FolderDataset(tree, 8), ImageFolder(str(tree))
    assert list(data.classes) == oracle.classes == ["A", "b", "c"]
    assert list(data.names) == [os.path.relpath(path, tree) for path, _ in oracle.samples]
    assert data.labels.tolist() == oracle.targets
    assert len(data) == 25
    assert data.image_shape == (3, 8, 8)
    assert data.unreadable == []


def test_gif_files_count_too(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    frames[0].save(save(tmp_path / "a/x.gif"), save_all=True, append_images=frames[1:])
    assert FolderDataset(tmp_path, 4).batch(np.array([0]))[0, :, 2, 2].tolist() == [1.0, 0.0, 0.0]


def test_a_link_upwards_is_not_followed_for_ever(tmp_path: Path) -> None:
    save(tmp_path / "a/x/1.png")
    os.symlink(tmp_path / "a", tmp_path / "a/x/loop")
    assert FolderDataset(tmp_path, 4).names == ["a/x/1.png"]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 40), (41, 64), (5, 5), (90, 33), (9, 7)])
def test_sizes_are_changed_as_torchvision_does(tmp_path: Path, width: int, height: int) -> None:
    path = save(tmp_path / "x.png", picture(width, height))
    oracle = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])(Image.open(path))
    difference = decode(path, 16).transpose(1, 2, 0).astype(int) - np.asarray(oracle).astype(int)
    assert np.abs(difference).max() <= 1  # rounding of the filter's weights


def test_shrinking_averages(tmp_path: Path) -> None:
    checks = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = decode(save(tmp_path / "x.png", Image.fromarray(checks)), 8)
    assert np.abs(pixels.astype(int) - 127).max() <= 2


def test_a_long_thin_image_needs_no_giant_intermediate(tmp_path: Path) -> None:
    assert decode(save(tmp_path / "x.png", Image.new("L", (60_000, 1), 9)), 224).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("rgb.png", Image.new("RGB", (6, 4), (10, 20, 30)), (10, 20, 30)),
        ("grey.png", Image.new("L", (6, 4), 77), (77, 77, 77)),
        ("bit.png", Image.new("1", (6, 4), 1), (255, 255, 255)),
        ("bit.bmp", Image.new("1", (6, 4), 0), (0, 0, 0)),
        ("palette.png", Image.new("RGB", (6, 4), (10, 20, 30)).quantize(4), (10, 20, 30)),
        ("palette.gif", Image.new("RGB", (6, 4), (10, 20, 30)).quantize(4), (10, 20, 30)),
        ("clear.png", Image.new("RGBA", (6, 4), (0, 0, 0, 0)), (255, 255, 255)),
        ("half.png", Image.new("RGBA", (6, 4), (100, 0, 200, 51)), (224, 204, 244)),
        ("half.webp", Image.new("RGBA", (6, 4), (100, 0, 200, 255)), (100, 0, 200)),
        ("greyalpha.png", Image.new("LA", (6, 4), (0, 51)), (204, 204, 204)),
        ("sixteen.png", Image.fromarray(np.full((4, 6), 65535, dtype=np.uint16)), (255, 255, 255)),
        ("sixteen2.png", Image.fromarray(np.full((4, 6), 257 * 100, dtype=np.uint16)), (100, 100, 100)),
        ("sixteen.tif", Image.fromarray(np.full((4, 6), 257 * 100, dtype=np.uint16)), (100, 100, 100)),
        ("sixteen.pgm", Image.fromarray(np.full((4, 6), 257 * 100, dtype=np.uint16)), (100, 100, 100)),
        ("float.tif", Image.fromarray(np.full((4, 6), 0.5, dtype=np.float32)), (128, 128, 128)),
        ("cmyk.tif", Image.new("CMYK", (6, 4), (255, 0, 0, 0)), (0, 255, 255)),
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 255)), (0, 0, 0)),
        ("grey.jpg", Image.new("L", (8, 8), 77), (77, 77, 77)),
        ("rgb.tif", Image.new("RGB", (6, 4), (10, 20, 30)), (10, 20, 30)),
        ("rgb.bmp", Image.new("RGB", (6, 4), (10, 20, 30)), (10, 20, 30)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_mode_becomes_rgb(tmp_path: Path, name: str, image: Image.Image, expected: tuple[int, int, int]) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    np.testing.assert_allclose(constant(save(tmp_path / name, image, **options)), expected, atol=1)


@pytest.mark.filterwarnings("error")
def test_damaged_exif_leaves_a_good_image_good(tmp_path: Path) -> None:
    save(tmp_path / "a/x.jpg", Image.new("L", (8, 8), 77), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    data = FolderDataset(tmp_path, 4)
    assert data.unreadable == []
    assert data.batch(np.array([0]))[0, 0, 2, 2] == pytest.approx(77 / 255, abs=0.005)


@pytest.mark.parametrize(("photometric", "expected"), [(0, 155), (1, 100)])
def test_sixteen_bits_with_white_as_zero(tmp_path: Path, photometric: int, expected: int) -> None:
    grey = Image.fromarray(np.full((4, 6), 257 * 100, dtype=np.uint16))
    path = save(tmp_path / "x.tif", grey, tiffinfo={262: photometric})
    with Image.open(path) as image:
        assert image.tag_v2[262] == photometric
    assert constant(path) == [expected] * 3


def test_transparent_colours_of_palette_and_rgb_lie_over_white(tmp_path: Path) -> None:
    palette = Image.new("P", (6, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert constant(save(tmp_path / "p.png", palette, transparency=0)) == [255, 255, 255]
    assert constant(save(tmp_path / "q.png", palette, transparency=1)) == [10, 20, 30]
    key = Image.new("RGB", (6, 4), (10, 20, 30))
    assert constant(save(tmp_path / "r.png", key, transparency=(10, 20, 30))) == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", picture(32, 32), exif=exif)
    oracle = np.asarray(ImageOps.exif_transpose(Image.open(path))).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(path, 32), oracle)


def damaged(folder: Path) -> dict[str, str]:
    """Write files that cannot be read into `folder`; return a part of the reason for each."""
    content = save(folder / "whole.jpg", picture(200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    png = save(folder / "whole.png", picture(200, 200)).read_bytes()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "flipped.png").write_bytes(png[:60] + bytes(64) + png[124:])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("I am no image")
    (folder / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    save(folder / "bomb.png", Image.new("1", (20_000, 20_000)))
    save(folder / "int32.tif", Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)))
    save(folder / "nan.tif", Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)))
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    os.mkfifo(folder / "pipe.png")
    for name in ("whole.jpg", "whole.png"):
        (folder / name).unlink()
    return {
        "bomb.png": "decompression bomb",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "dangling.png": "no such file",
        "empty.png": "empty",
        "flipped.png": "broken|CRC|checksum|header",
        "int32.tif": "known range",
        "nan.tif": r"\[0, 1\]",
        "pipe.png": "not a regular file",
        "script.jpg": "known format",
        "text.jpg": "known format",
    }


def test_damaged_files_give_their_reason(tmp_path: Path) -> None:
    for name, reason in damaged(tmp_path).items():
        with pytest.raises(UnreadableImageError, match=reason) as caught:
            decode(tmp_path / name, 8)
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_damaged_files_are_named_and_left_out(tmp_path: Path, cache_bytes: int) -> None:
    for seed in range(6):
        save(tmp_path / f"{'ab'[seed % 2]}/m{seed}.png", picture(seed=seed))
    bad = damaged(tmp_path / "a")
    data = FolderDataset(tmp_path, 8, cache_bytes=cache_bytes)
    assert [name for name, _ in data.unreadable] == [f"a/{name}" for name in sorted(bad)]
    assert all(reason for _, reason in data.unreadable)
    assert data.names == ["a/m0.png", "a/m2.png", "a/m4.png", "b/m1.png", "b/m3.png", "b/m5.png"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = data.batch(np.array([5, 0, 5]))
    assert pixels.dtype == torch.float32
    for row, name in zip(pixels, ["b/m5.png", "a/m0.png", "b/m5.png"], strict=True):
        np.testing.assert_allclose(row.numpy(), decode(tmp_path / name, 8) / 255.0, atol=1e-7)


def test_the_cache_serves_without_the_files_and_no_cache_notices_their_loss(tmp_path: Path) -> None:
    save(tmp_path / "t/a/1.png")
    cached, uncached = FolderDataset(tmp_path / "t", 8), FolderDataset(tmp_path / "t", 8, cache_bytes=0)
    first = cached.batch(np.array([0]))
    torch.testing.assert_close(uncached.batch(np.array([0])), first)
    (tmp_path / "t/a/1.png").unlink()
    torch.testing.assert_close(cached.batch(np.array([0])), first)
    with pytest.raises(UserError, match=r"a/1\.png cannot be read: no such file; it could be when it was checked"):
        uncached.batch(np.array([0]))


def test_fingerprint_follows_files_and_size_but_not_the_place(tmp_path: Path) -> None:
    save(tmp_path / "t/a/1.png")
    save(tmp_path / "t/b/2.png", picture(seed=1))
    first = FolderDataset(tmp_path / "t", 8).fingerprint
    assert FolderDataset(tmp_path / "t", 8).fingerprint == first
    assert FolderDataset(tmp_path / "t", 9).fingerprint != first
    shutil.copytree(tmp_path / "t", tmp_path / "copy")
    assert FolderDataset(tmp_path / "copy", 8).fingerprint == first
    os.utime(tmp_path / "copy/a/1.png", ns=(0, 12345))
    assert FolderDataset(tmp_path / "copy", 8).fingerprint != first
    (tmp_path / "t/b/2.png").rename(tmp_path / "t/b/3.png")
    assert FolderDataset(tmp_path / "t", 8).fingerprint != first


def refused(folder: Path, image_size: int = 8) -> str:
    with pytest.raises(UserError) as caught:
        FolderDataset(folder, image_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses_what_is_no_class_per_folder_tree(tmp_path: Path) -> None:
    assert "there is no folder" in refused(tmp_path / "absent")
    path = save(tmp_path / "flat/1.png")
    assert "cannot read the folder" in refused(path)
    assert "folder of their own" in refused(tmp_path / "flat")
    (tmp_path / "flat/cats").mkdir()
    assert "'cats'" in refused(tmp_path / "flat")
    (tmp_path / "flat/cats/1.png").write_text("broken")
    message = refused(tmp_path / "flat")
    assert "class 'cats'" in message
    assert "cats/1.png" in message
    shutil.copy(path, tmp_path / "flat/cats/2.png")
    assert len(FolderDataset(tmp_path / "flat", 8)) == 1
    assert "at least 1" in refused(tmp_path / "flat", 0)
    (tmp_path / "flat/.ipynb_checkpoints").mkdir()
    assert "'.ipynb_checkpoints'" in refused(tmp_path / "flat")


def test_names_that_are_no_utf8_can_be_written(tmp_path: Path) -> None:
    save(tmp_path / "a/1.png")
    try:
        os.rename(tmp_path / "a/1.png", os.fsencode(tmp_path / "a") + b"/\xff.png")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert FolderDataset(tmp_path, 8).names == ["a/\\xff.png"]
