"""Data of a user's own: images in folders, arrays with a split by class, and image files that are refused."""
import io
import json
import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from data_helpers import arrays, one_line
from relkd.data import inventory, load


def picture(path, seed=0, size=(9, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode).save(path)


def folder(root, test="test", classes=("ant", "bee", "cat"), size=(9, 9)):
    for s, part in enumerate(("train", test)):
        for c, name in enumerate(classes):
            for i in range(3 - s):
                picture(root / part / name / f"{i}.{('png', 'bmp', 'PNG')[i]}", 100 * s + 10 * c + i, size, "L" if i == 1 else "RGB")
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_images_in_folders_are_torchvisions(tmp_path, test):
    folder(tmp_path / "own", test)
    (tmp_path / "own" / "train" / "ant" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "own" / "train" / "ant" / "notes.txt").write_text("x")
    (tmp_path / "own" / "train" / ".ipynb_checkpoints").mkdir()
    before = sorted(tmp_path.rglob("*"))
    data = load("own", tmp_path)
    assert data.name == "own" and data.classes == ("ant", "bee", "cat") and data.counts == {"train": 9, "test": 6} and not data.by_class
    (tmp_path / "own" / "train" / "ant" / ".hidden.png").unlink()
    (tmp_path / "own" / "train" / ".ipynb_checkpoints").rmdir()
    for part, (x, y) in (("train", data.split("train")), (test, data.split("test"))):
        theirs = ImageFolder(tmp_path / "own" / part)
        assert y.tolist() == theirs.targets and all(np.array_equal(a.permute(1, 2, 0).numpy(), np.asarray(b))
                                                    for a, (b, _) in zip(x, theirs, strict=True))
    assert len(before) == len(sorted(tmp_path.rglob("*"))) + 2, "something was written"
    assert load(str(tmp_path / "own")).fingerprint == data.fingerprint == load(str(tmp_path / "own") + "/", "/nowhere").fingerprint


def test_images_of_phones_and_macs_are_read_or_named(tmp_path):
    """The fault: a .heic among the .jpg was left out without a word, and __MACOSX was a class."""
    folder(tmp_path / "own")
    want, train = load("own", tmp_path), tmp_path / "own" / "train"
    (train / "__MACOSX").mkdir()
    (train / "__MACOSX" / "._0.png").write_bytes(b"x")
    for split, spelling in (("train", "NFD"), ("test", "NFC")):
        picture(tmp_path / "own" / split / unicodedata.normalize(spelling, "käfer") / "0.gif", 5)
    assert load("own", tmp_path).classes == (*want.classes, "käfer")
    (train / "ant" / "9.heic").write_bytes(b"\0\0\0\x20ftypheic" + bytes(50))
    one_line(lambda: load("own", tmp_path), "image train/ant/9.heic is an image of a phone (HEIC or AVIF): save it as PNG")


def test_three_splits_grey_and_a_size(tmp_path):
    folder(tmp_path / "own"), folder(tmp_path / "own", "val")
    data = load("own", tmp_path, size=5, grey=True)
    assert data.images.shape[1:] == (1, 5, 5) and data.counts == {"train": 9, "val": 6, "test": 6}
    whole = load("own", tmp_path, size=9)
    assert whole.fingerprint == load("own", tmp_path).fingerprint
    want = torch.nn.functional.interpolate(whole.images[:1].float(), (5, 5), mode="bilinear", antialias=True).round().clamp(0, 255)
    assert torch.equal(load("own", tmp_path, size=5).images[:1].float(), want)
    other = {e["name"]: e for e in inventory(tmp_path)}
    assert other["own"]["fingerprint"] == whole.fingerprint and other["own"]["counts"]["val"] == 6
    picture(tmp_path / "own" / "train" / "ant" / "9.png", 5)
    assert {e["name"]: e for e in inventory(tmp_path)}["own"]["counts"]["train"] == 10


def png16(colour):
    """Two by two pixels of 16 bits: grey (0), RGB (2), grey and alpha (4)."""
    n = {0: 1, 2: 3, 4: 2}[colour]

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(range(4 * n)) for _ in range(2))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "TIFF")
    return out.getvalue()


@pytest.mark.parametrize("content", [png16(0), png16(2), png16(4), tiff(np.zeros((2, 2), np.uint16)), tiff(
    np.zeros((2, 2), np.int32)), tiff(np.zeros((2, 2), np.float32)), b"P6 2 2 65535\n" + bytes(24)],
                         ids=["png grey", "png rgb", "png alpha", "tiff 16", "tiff 32", "tiff float", "ppm"])
def test_more_than_eight_bits_are_refused(tmp_path, content):
    folder(tmp_path / "own")
    (tmp_path / "own" / "test" / "bee" / "deep.png").write_bytes(content)
    one_line(lambda: load("own", tmp_path, size=9), "own: image test/bee/deep.png has more than 8 bits a channel (mode ",
             "convert it to 8 bits")


@pytest.mark.parametrize("mode, kind", [("1", "png"), ("L", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"),
                                        ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "webp")])
def test_all_kinds_of_eight_bits_become_rgb(tmp_path, mode, kind):
    folder(tmp_path / "own")
    path = tmp_path / "own" / "train" / "ant" / f"9.{kind}"
    picture(path, 3, mode=mode)
    assert np.array_equal(load("own", tmp_path).images[3].permute(1, 2, 0).numpy(), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("spoil, options, expected", [
    (lambda f: picture(f / "test" / "bee" / "z.png", size=(9, 8)), {},
     "own: image test/bee/z.png must have 9 x 9 pixels; got 9 x 8: all must have one size, or choose one, size=32"),
    (lambda f: picture(f / "train" / "ant" / "0.png", size=(9, 8)), {},
     "0.png has 9 x 8 pixels, not a square: choose a size for all, size=32"),
    (lambda f: (f / "train" / "ant" / "0.png").write_bytes(b"no image"), {}, "0.png is no image, or damaged (UnidentifiedImageError)"),
    (lambda f: (f / "train" / "ant" / "0.png").write_bytes((f / "train" / "ant" / "0.png").read_bytes()[:60]), {},
     "image train/ant/0.png is missing or damaged"),
    (lambda f: (f / "test" / "dog").mkdir(), {}, "class 'dog' has no image in"),
    (lambda f: picture(f / "test" / "dog" / "0.png"), {}, "class 'dog' in split 'test' of"),
    (lambda f: [shutil.rmtree(f / "train" / c) for c in ("ant", "bee", "cat")], {}, "train must hold one folder of images for each class"),
    (lambda f: shutil.rmtree(f / "test"),
     {}, "looked for own/{train,test}_{images,labels}.npy and own/{images,labels}.npy with splits.json and "
         "own/train/CLASS/*.png with own/test/ and own/train/CLASS/*.png with own/val/ (own/test, own/val missing); "
         "place one of these"),
    (lambda f: None, {"size": 0}, "size is the height and width of an image, at least 1; got 0"),
    (lambda f: None, {"sice": 8}, "data set 'own' has no option 'sice': it has size, grey"),
])
def test_folders_that_are_wrong(tmp_path, spoil, options, expected):
    spoil(folder(tmp_path / "own"))
    one_line(lambda: load("own", tmp_path, **options), expected)


def test_paths_and_names_that_lead_nowhere(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    one_line(lambda: load("empty", tmp_path), "unknown data set 'empty'")
    one_line(lambda: load(str(tmp_path / "empty")), f"data set 'empty' is not in {tmp_path}: looked for empty/")
    one_line(lambda: load(str(tmp_path / "none")), "unknown data set")
    folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "empty")
    assert load("../mine", "/nowhere").name == "mine"
    one_line(lambda: load("mien", tmp_path), "unknown data set 'mien': did you mean 'mine'?")


# --- arrays with a split by class

def few(root, splits={"train": ["ant", 1], "val": ["cat"], "test": ["dog"]}, classes="ant\nbee\ncat\ndog\n"):
    root.mkdir()
    np.save(root / "images.npy", np.random.default_rng(0).integers(0, 256, (12, 5, 5, 3), dtype=np.uint8))
    np.save(root / "labels.npy", (np.arange(12) % 4).astype(np.uint8))
    (root / "splits.json").write_text(splits if isinstance(splits, str) else json.dumps(splits))
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def test_arrays_with_a_split_by_class(tmp_path):
    few(tmp_path / "own")
    data = load("own", tmp_path)
    assert (data.by_class and data.splits == {"train": (0, 1), "val": (2,), "test": (3,)}
            and data.counts == {"train": 6, "val": 3, "test": 3} and data.classes == ("ant", "bee", "cat", "dog"))
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), np.load(tmp_path / "own" / "images.npy"))
    data.images.zero_()
    assert np.load(tmp_path / "own" / "images.npy").any()
    few(tmp_path / "two", {"train": [0, "1"], "test": [3]}, None)
    assert load("two", tmp_path).splits == {"train": (0, 1), "test": (3,)} and load("two", tmp_path).classes == tuple("0123")
    assert [e["by_class"] for e in inventory(tmp_path)] == [False, True, True]


@pytest.mark.parametrize("splits, expected", [
    ("{", "splits.json cannot be read"), ("[]", "must hold lists of class names or numbers"),
    ('{"train": "ant"}', "must hold lists"), ({"train": [0.5], "test": [1]}, "must hold lists"),
    ({"train": [True], "test": [1]}, "must hold lists"),
    ({"train": ["ant"], "test": ["bea"]}, "unknown class of own 'bea': did you mean 'bee'?"),
    ({"train": ["ant"], "test": [0]}, "the splits of own share class 'ant'"),
    ({"train": ["ant"], "test": [4]}, "names an unknown class 4: classes are numbered from 0 to 3"),
    ({"train": ["ant"], "test": [-1]}, "names an unknown class -1"), ({"train": ["ant"]}, "own has no class in split 'test'"),
])
def test_splits_that_are_wrong(tmp_path, splits, expected):
    few(tmp_path / "own", splits)
    one_line(lambda: load("own", tmp_path), expected)


def test_plain_arrays_come_first_and_have_no_options(tmp_path):
    folder(arrays(tmp_path / "own"))
    assert load("own", tmp_path).counts == {"train": 6, "test": 4}
    one_line(lambda: load("own", tmp_path, size=8), "data set 'own' has no option 'size': it has none")


def test_tiny_imagenet_unpacked_is_not_a_folder_of_ones_own_too(tmp_path):
    """The fault: read as tinyimagenet, and listed once more as damaged."""
    from relkd.data.folder import own_names

    for name in ("tiny-imagenet-200", "pets"):
        (tmp_path / name / "train" / "a").mkdir(parents=True)
    assert own_names(tmp_path) == ["pets", "tiny-imagenet-200"]
    (tmp_path / "tiny-imagenet-200" / "wnids.txt").write_text("n01443537\n")
    assert own_names(tmp_path) == ["pets"]
