"""Data in the forms that circulate: read with the publisher's fingerprint, or named in one line with what to do."""
import io
import json
import os
import pickle
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import IDS, arrays, jpeg, one_line, tiny
from PIL import Image

from relkd.data import CLASSES, import_folder, inventory, load, unread
from relkd.data.entries import Entries, check_stamp, stamp
from relkd.data.finds import finds, near
from relkd.data.forms import kind_of, lines_of, plain_name, read_pickle
from relkd.data.images import read_pixels
from relkd.ground import digest
from relkd.records import load_records

APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X" + b"\0" * 80


def encoded(a, fmt="PNG", **more):
    out = io.BytesIO()
    Image.fromarray(a).save(out, fmt, **more)
    return out.getvalue()


def picture(seed, size=84):
    return np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(size // 6, 0).repeat(size // 6, 1)


# --- images

@pytest.mark.parametrize("make", [
    lambda a: encoded(a, "BMP"), lambda a: encoded(a, "TIFF"), lambda a: encoded(a, "GIF"), lambda a: encoded(a, "WEBP", lossless=True),
    lambda a: encoded(a) + b"garbage", lambda a: encoded(a, "JPEG", quality=95, progressive=True),
])
def test_pixels_are_those_of_pillow(make):
    content = make(picture(1))
    want = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert np.array_equal(read_pixels(lambda: content, "x.png", "there"), want)


@pytest.mark.parametrize("content, message", [
    (encoded((picture(0)[..., 0].astype(np.uint16) * 257)), "image x.png has more than 8 bits a channel"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "image x.png is a git-lfs pointer: run `git lfs pull`"),
    (b"<!DOCTYPE html><html>", "image x.png is a web page"),
    (b"", "image x.png is empty: get it again"),
    (b"\0\0\0\x20ftypheic" + b"\0" * 50, "image x.png is an image of a phone (HEIC or AVIF): save it as PNG"),
    (encoded(picture(1), "JPEG")[:300], "image x.png is missing or damaged (OSError): get the file again"),
])
def test_an_image_that_cannot_be_read_is_called_what_it_is(content, message):
    one_line(lambda: read_pixels(lambda: content, "x.png", "there"), message)


# --- texts, names, pickles

def test_texts_and_names_of_other_machines():
    assert lines_of(b"\xef\xbb\xbfcat\r\ndog \r\n\r\n", "x") == ["cat", "dog"]
    for content, what in (("熊猫\n".encode("gbk"), "UnicodeDecodeError"), ("cat\n".encode("utf-16"), "UTF-16")):
        one_line(lambda: lines_of(content, "classes.txt"), "classes.txt cannot be read", what, "save it as UTF-8")
    assert plain_name(unicodedata.normalize("NFD", "Käfer.JPG")) == plain_name("käfer.jpg") and kind_of(b"hello") == ""


def test_a_pickle_makes_arrays_and_calls_nothing_else(tmp_path):
    path, good = tmp_path / "x.pkl", {"image_data": np.arange(6, dtype=np.uint8).reshape(2, 3), "class_dict": {"n01": [0, 1]}}
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(good, protocol))
        assert np.array_equal(read_pickle(path)["image_data"], good["image_data"])

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for bad in (pickle.dumps(Evil()), pickle.dumps(os.system), b"\x80\x04junk", b""):
        path.write_bytes(bad)
        one_line(lambda: read_pickle(path), "is no pickle of arrays")
    assert not (tmp_path / "executed").exists()


# --- folders and archives

def entries_of(path):
    with zipfile.ZipFile(path) as z:
        return {n: z.read(n) for n in z.namelist() if ".." not in n}


def as_zip(root, entries, name="tiny-imagenet-200.zip"):
    with zipfile.ZipFile(root / name, "w") as z:
        for n, content in entries.items():
            z.writestr(zipfile.ZipInfo(n), content)


def as_tree(root, entries):
    for n, content in entries.items():
        (root / n).parent.mkdir(parents=True, exist_ok=True)
        (root / n).write_bytes(content)


def in_class_folders(e, texts=False, images="images/"):
    top, out = "tiny-imagenet-200/", {n: c for n, c in e.items() if "/val/images/" not in n}
    for row in e[f"{top}val/val_annotations.txt"].decode().splitlines():
        file, wnid = row.split("\t")[:2]
        out[f"{top}val/{wnid}/{images}{file}"] = e[f"{top}val/images/{file}"]
    return out if texts else {n: c for n, c in out.items() if not n.endswith(".txt")}


TOP = "tiny-imagenet-200/"
SHAPES = {
    "unpacked": lambda r, e: as_tree(r, e),
    "unpacked, val in folders of classes": lambda r, e: as_tree(r, in_class_folders(e)),
    "in tinyimagenet/ itself": lambda r, e: as_tree(r, {n.replace(TOP, "tinyimagenet/"): c for n, c in in_class_folders(e).items()}),
    "zip, val in folders of classes": lambda r, e: as_zip(r, in_class_folders(e)),
    "zip, val in folders, texts kept": lambda r, e: as_zip(r, in_class_folders(e, True, "")),
    "zip of a Mac": lambda r, e: as_zip(r, e | {f"__MACOSX/{n}": APPLE for n in e}
                                        | {n.replace("/n0", "/._n0"): APPLE for n in e if "/n0" in n}),
    "zip with backslashes": lambda r, e: as_zip(r, {n.replace("/", "\\"): c for n, c in e.items()}),
    "zip without the top folder": lambda r, e: as_zip(r, {n.removeprefix(TOP): c for n, c in e.items()}),
    "zip with the top folder twice, another name": lambda r, e: as_zip(r, {TOP + n: c for n, c in e.items()}, "Tiny-ImageNet.zip"),
    "texts with BOM and CRLF": lambda r, e: as_zip(r, {n: b"\xef\xbb\xbf" + c.replace(b"\n", b"\r\n") if n.endswith(".txt") else c
                                                       for n, c in e.items()}),
    "jpg, no images level": lambda r, e: as_zip(r, {n.replace(".JPEG", ".jpg").replace("/images/", "/") if "/train/" in n else n: c
                                                    for n, c in e.items()}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tiny_imagenet_in_any_shape_is_the_publishers(tmp_path, shape):
    path = tiny(tmp_path / "published")
    want, root = load("tinyimagenet", tmp_path / "published"), tmp_path / "other"
    root.mkdir()
    SHAPES[shape](root, entries_of(path))
    assert unread(root) == []
    got = load("tinyimagenet", root)
    assert got.fingerprint == want.fingerprint and [c[:9] for c in got.classes] == sorted(IDS)
    assert load("tinyimagenet", root).fingerprint == want.fingerprint, "and again from its arrays"


def test_arrays_of_another_zip_are_not_read_and_a_cache_may_lie_elsewhere(tmp_path, monkeypatch):
    root = tmp_path / "data"
    path = tiny(root)
    monkeypatch.setenv("RELKD_CACHE", str(tmp_path / "cache"))
    want = load("tinyimagenet", root).fingerprint
    assert [p.name for p in root.iterdir()] == [path.name] and load("tinyimagenet", root).fingerprint == want
    tiny(root, **{"train/n01443537/images/n01443537_1.JPEG": jpeg(77)})
    one_line(lambda: load("tinyimagenet", root), "was made of another tiny-imagenet-200.zip than lies there now: remove")


@pytest.mark.parametrize("spoil, message", [
    (lambda i: setattr(i, "flag_bits", i.flag_bits | 1), "x.zip is locked by a password: unpack it, the folder is read as well"),
    (lambda i: setattr(i, "external_attr", 0o120777 << 16), "x.zip holds a link, 0.png, in the place of a file: unpack it"),
])
def test_a_zip_that_cannot_be_read_says_why(tmp_path, spoil, message):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr("0.png", b"/etc/passwd")
        spoil(z.infolist()[0])
    one_line(lambda: Entries(tmp_path / "x.zip"), message)


@pytest.mark.parametrize("how", ["ZIP_STORED", "ZIP_DEFLATED", "ZIP_BZIP2", "ZIP_LZMA"])
def test_zips_that_python_reads(tmp_path, how):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", getattr(zipfile, how)) as z:
        z.writestr("/top/0.png", b"here")
    with Entries(tmp_path / "x.zip") as e:
        assert e.read(e.names[0]) == b"here"


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    as_tree(tmp_path, {"set/a/0.png": b"x", "elsewhere/1.png": b"y"})
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "self").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert Entries(tmp_path / "set").names == ["a/0.png", "linked/1.png"]


def test_a_name_in_another_spelling_or_deeper_is_found_and_a_doubtful_one_is_not(tmp_path):
    for n in ("a/Käfer.JPG", "a/twice.png", "b/twice.png"):
        (tmp_path / n).parent.mkdir(exist_ok=True)
        (tmp_path / unicodedata.normalize("NFD", n)).write_bytes(n.encode())
    e = Entries(tmp_path)
    assert e.read("Käfer.jpg") == e.read("a/käfer.jpg") == "a/Käfer.JPG".encode()
    for name in ("twice.png", "none.png", "../a/twice.png"):
        with pytest.raises(FileNotFoundError):
            e.read(name)
    (tmp_path / "kept").mkdir()
    stamp(tmp_path / "kept", [tmp_path / "a"])
    check_stamp(tmp_path / "kept", [tmp_path / "a", tmp_path / "gone"])


# --- miniImageNet

def copy(root, name="miniimagenet"):
    folder = root / name
    (folder / "images").mkdir(parents=True)
    for k, split in enumerate(("train", "val", "test")):
        rows = [(f"n{k}{c}_{i}.jpg", f"n{k}{c}") for c in range(2) for i in range(2)]
        (folder / f"{split}.csv").write_text("filename,label\n" + "".join(f"{f},{c}\n" for f, c in rows))
        for f, _ in rows:
            (folder / "images" / f).write_bytes(encoded(picture(len(f) + k * 7 + int(f[4])), "JPEG", quality=95))
    return folder


def rewritten(change):
    def of(folder):
        for s in ("train", "val", "test"):
            p = folder / f"{s}.csv"
            p.write_bytes(change(p.read_text()).encode("utf-8"))
    return of


def zipped(folder):
    as_zip(folder, {f"images/{p.name}": p.read_bytes() for p in (folder / "images").iterdir()}, "images.zip")
    [p.unlink() for p in (folder / "images").iterdir()]
    (folder / "images").rmdir()


def deeper(folder):
    (folder / "images").rename(folder / "im")
    (folder / "images").mkdir()
    (folder / "im").rename(folder / "images" / "images")


COPIES = {
    "as listed": lambda f: None,
    "BOM": rewritten(lambda t: "\ufeff" + t), "semicolons": rewritten(lambda t: t.replace(",", ";")),
    "blanks": rewritten(lambda t: t.replace(",", ", ")),
    "other columns": rewritten(lambda t: t.replace("filename,label", "image_name,class_name")),
    "capitals": lambda f: [p.rename(p.with_suffix(".JPG")) for p in list((f / "images").iterdir())],
    "one folder deeper": deeper, "images.zip": zipped, "another name": lambda f: f.rename(f.with_name("mini-ImageNet")),
}


@pytest.mark.parametrize("kind", COPIES)
def test_miniimagenet_as_people_have_it(tmp_path, kind):
    copy(tmp_path / "a")
    want = load("miniimagenet", tmp_path / "a").fingerprint
    COPIES[kind](copy(tmp_path / "b"))
    assert load("miniimagenet", tmp_path / "b").fingerprint == load("miniimagenet", tmp_path / "b").fingerprint == want


def test_miniimagenet_in_three_folders_and_in_two_pickles(tmp_path):
    folder = copy(tmp_path / "a")
    want = load("miniimagenet", tmp_path / "a")
    images = want.images.permute(0, 2, 3, 1).numpy()
    for k, split in enumerate(("train", "val", "test")):
        for c in range(2):
            for i in range(2):
                to = tmp_path / "b" / "miniimagenet" / split / f"n{k}{c}"
                to.mkdir(parents=True, exist_ok=True)
                (to / f"n{k}{c}_{i}.jpg").write_bytes((folder / "images" / f"n{k}{c}_{i}.jpg").read_bytes())
    assert load("miniimagenet", tmp_path / "b").fingerprint == want.fingerprint
    for root, form, train in (("c", "mini-imagenet-cache-{}.pkl", "train"),
                              ("d", "miniImageNet_category_split_{}.pickle", "train_phase_train")):
        (tmp_path / root / "miniImagenet").mkdir(parents=True)
        for k, split in enumerate(("train", "val", "test")):
            part = images[4 * k:4 * k + 4]
            named = {"image_data": part, "class_dict": {f"n{k}1": [2, 3], f"n{k}0": [0, 1]}}
            d = named if root == "c" else {"data": part, "labels": [64, 64, 65, 65]}
            (tmp_path / root / "miniImagenet" / form.format(train if split == "train" else split)).write_bytes(pickle.dumps(d, 2))
        got = load("miniimagenet", tmp_path / root)
        assert got.fingerprint == want.fingerprint and (root == "d" or got.classes == want.classes)


def test_lists_or_images_that_were_replaced_are_noticed(tmp_path):
    folder = copy(tmp_path)
    load("miniimagenet", tmp_path)
    val, test = ((folder / f"{s}.csv").read_text() for s in ("val", "test"))
    (folder / "val.csv").write_text(test)
    (folder / "test.csv").write_text(val)
    one_line(lambda: load("miniimagenet", tmp_path), "was made of another val.csv than lies there now")
    (folder / "val.csv").write_text(val)
    (folder / "test.csv").write_text(test)
    load("miniimagenet", tmp_path)
    (folder / "images" / "n00_0.jpg").write_bytes(b"x")
    one_line(lambda: load("miniimagenet", tmp_path), "was made of another images than lies there now")


# --- Omniglot

def drawings(invert=False, size=105):
    out, n = {}, 0
    for subset, alphabets in (("images_background", ("Latin", "Hebrew", "Armenian")), ("images_evaluation", ("Kannada", "Tibetan"))):
        for a in alphabets:
            for c in (1, 2):
                n += 1
                ink = np.zeros((size, size), bool)
                ink[n:n + 9, 5 * c:size // 2] = True
                out[f"{subset}/{a}/character{c:02}/{n:04}_01.png"] = encoded(((ink if invert else ~ink) * 255).astype(np.uint8))
    return out


def omniglot_zips(folder, entries, again=False):
    folder.mkdir(parents=True, exist_ok=again)
    for s in ("images_background", "images_evaluation"):
        as_zip(folder, {n: c for n, c in entries.items() if n.startswith(s)}, f"{s}.zip")


def test_omniglot_unpacked_or_in_a_clone_is_that_of_the_zips(tmp_path):
    omniglot_zips(tmp_path / "a" / "omniglot-py", drawings())
    want = load("omniglot", tmp_path / "a").fingerprint
    as_tree(tmp_path / "b" / "omniglot-py", drawings())
    omniglot_zips(tmp_path / "c" / "omniglot" / "python", drawings())
    as_tree(tmp_path / "d" / "omniglot" / "data", {n.split("/", 1)[1]: c for n, c in drawings().items()})
    for root in "bcd":
        assert load("omniglot", tmp_path / root).fingerprint == load("omniglot", tmp_path / root).fingerprint == want
    omniglot_zips(tmp_path / "e" / "omniglot-py", drawings(invert=True))
    one_line(lambda: load("omniglot", tmp_path / "e"), "images_background.zip holds more ink than paper: its drawings are inverted")
    omniglot_zips(tmp_path / "a" / "omniglot-py", drawings(size=104), again=True)
    one_line(lambda: load("omniglot", tmp_path / "a"), "was made of another images_background.zip than lies there now: remove")


def test_drawings_that_somebody_shrank_are_read_as_they_are(tmp_path):
    as_tree(tmp_path / "a" / "omniglot_resized", {n.split("/", 1)[1]: c for n, c in drawings(size=28).items()})
    omniglot_zips(tmp_path / "b" / "omniglot-py", drawings(size=28))
    d, again = load("omniglot", tmp_path / "a"), load("omniglot", tmp_path / "b")
    assert d.fingerprint == again.fingerprint == load("omniglot", tmp_path / "a").fingerprint and d.images.shape == (40, 1, 28, 28)
    drawn = np.asarray(Image.open(io.BytesIO(drawings(size=28)["images_background/Latin/character01/0001_01.png"])))
    first = d.classes.index("Latin/character01/rot000")
    assert np.array_equal(d.images[d.labels == first][0, 0].numpy(), 255 - drawn)
    one_line(lambda: load("omniglot", tmp_path / "a", resize="nearest"), "were shrunk to 28 x 28 already: resize='nearest' needs the")
    as_tree(tmp_path / "c" / "omniglot_resized", {n.split("/", 1)[1]: c for n, c in drawings(size=35).items()})
    one_line(lambda: load("omniglot", tmp_path / "c"), "must have 105 x 105 pixels; got 35 x 35: the publisher's have 105, and 28 are read")
    omniglot_zips(tmp_path / "d" / "omniglot-py", drawings(invert=True, size=28))
    one_line(lambda: load("omniglot", tmp_path / "d"), "holds more ink than paper")


# --- CIFAR

def binary(folder, files, labels, n=3):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = {f: rng.integers(0, 10, (n, labels + 3072), dtype=np.uint8) for f in files}
    for f, r in rows.items():
        (folder / f).write_bytes(r.tobytes())
    return rows


def test_cifars_binary_version(tmp_path):
    rows = binary(tmp_path / "a" / "cifar-100-binary", ("train.bin", "test.bin"), 2)
    ten = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    binary(tmp_path / "b" / "data" / "cifar-10-batches-bin", ten, 1)
    with pytest.warns(UserWarning, match="holds 3 images for train; the publisher's has 50,000"):
        d = load("cifar100", tmp_path / "a")
    assert d.train_labels.tolist() == rows["train.bin"][:, 1].tolist() and d.classes == CLASSES["cifar100"]
    assert np.array_equal(d.train_images[1].numpy().ravel(), rows["train.bin"][1, 2:])
    with pytest.warns(UserWarning):
        assert load("cifar10", tmp_path / "b").train_images.shape == (15, 3, 32, 32)
    (tmp_path / "a" / "cifar-100-binary" / "test.bin").write_bytes(b"x" * 3075)
    one_line(lambda: load("cifar100", tmp_path / "a"), "test.bin is no whole number of rows of 3,074 bytes")


NAMES = {"train": ("bed", "apple"), "val": ("lamp", "bee"), "test": ("man", "fox")}  # bed is not in CIFAR-FS's train


def cifar_parts():
    rng = np.random.default_rng(0)
    return {s: rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8) for s in NAMES}


FEW_SHOT = {
    "pickles": lambda r, name, x: [as_tree(r / "data" / {"cifar_fs": "CIFAR-FS", "fc100": "FC100"}[name], {
        f"{name.upper()}_{s}.pickle": pickle.dumps({"data": x[s], "labels": [9, 9, 3, 3]}, 2)}) for s in NAMES],
    "pickles in the root": lambda r, name, x: [as_tree(r, {
        f"{name.upper()}_{s}.pickle": pickle.dumps({b"data": list(x[s]), b"labels": np.array([9, 9, 3, 3])}, 4)}) for s in NAMES],
    "three folders": lambda r, name, x: [as_tree(r / name, {
        f"{s}/{c}/{i}.png": encoded(x[s][2 * k + i]) for k, c in enumerate(NAMES[s]) for i in range(2)}) for s in NAMES],
    "deeper, validation": lambda r, name, x: [as_tree(r / name / "processed", {
        f"{s.replace('val', 'validation')}/{c}/{i}.png": encoded(x[s][2 * k + i]) for k, c in enumerate(NAMES[s]) for i in range(2)})
        for s in NAMES],
    "lists of classes": lambda r, name, x: [as_tree(r / "cifar100", {f"splits/bertinetto/{s}.txt": "\r\n".join(NAMES[s]).encode()} | {
        f"data/{c}/{i}.png": encoded(x[s][2 * k + i]) for k, c in enumerate(NAMES[s]) for i in range(2)}) for s in NAMES],
}


@pytest.mark.parametrize("form", FEW_SHOT)
@pytest.mark.parametrize("name", ["cifar_fs", "fc100"])
def test_cifars_few_shot_sets_as_they_circulate(tmp_path, name, form):
    x = cifar_parts()
    FEW_SHOT[form](tmp_path, name, x)
    if (name, form) == ("fc100", "lists of classes"):
        one_line(lambda: load(name, tmp_path), "data set 'fc100' is not in")
        return
    with pytest.warns(UserWarning, match=f"{name}: 12 images of 6 classes; the published set has 60,000 of 100") as said:
        d, again = load(name, tmp_path), load(name, tmp_path)
    assert d.fingerprint == again.fingerprint and d.splits == {"train": (0, 1), "val": (2, 3), "test": (4, 5)}
    if "pickle" in form:                                        # labels 9, 9, 3, 3: class 3 first
        assert d.classes[0] == "train03" and np.array_equal(d.images[2].permute(1, 2, 0).numpy(), x["train"][2])
        assert d.labels[:4].tolist() == [1, 1, 0, 0]
    else:
        assert d.classes == ("apple", "bed", "bee", "lamp", "fox", "man")
        assert any(f"{name}: class " in str(w.message) and "not so in the published split" in str(w.message) for w in said)
        assert np.array_equal(d.images[d.labels == 1][0].permute(1, 2, 0).numpy(), x["train"][0])


def test_pickles_that_are_no_such_set_or_were_replaced(tmp_path):
    x = cifar_parts()
    FEW_SHOT["pickles"](tmp_path, "fc100", x)
    with pytest.warns(UserWarning):
        load("fc100", tmp_path)
    path = tmp_path / "data" / "FC100" / "FC100_val.pickle"
    path.write_bytes(pickle.dumps({"data": x["test"], "labels": [9, 9, 3, 3]}, 2))
    one_line(lambda: load("fc100", tmp_path), "was made of another FC100_val.pickle than lies there now: remove")
    for root, d, got in (("a", {"data": x["val"] / 255, "labels": [0] * 4}, "it holds float64 (4, 32, 32, 3) and 4 labels"),
                         ("b", [1, 2], "it holds nothing of the kind")):
        FEW_SHOT["pickles"](tmp_path / root, "fc100", x)
        (tmp_path / root / "data" / "FC100" / "FC100_val.pickle").write_bytes(pickle.dumps(d, 2))
        one_line(lambda: load("fc100", tmp_path / root), "FC100_val.pickle must hold", got)


def test_lists_that_name_a_file_twice(tmp_path):
    folder = copy(tmp_path)
    text = (folder / "train.csv").read_text()
    (folder / "train.csv").write_text(text + "n00_0.jpg,n00\n")
    with pytest.warns(UserWarning, match="train.csv names 1 images twice: they count once"):
        assert len(load("miniimagenet", tmp_path).labels) == 12
    (folder / "train.csv").write_text(text + "N00_0.jpg,n01\n")
    (folder / "arrays" / "made_of.json").unlink()
    [p.unlink() for p in (folder / "arrays").iterdir()]
    one_line(lambda: load("miniimagenet", tmp_path), "train.csv gives 'N00_0.jpg' to class 'n01', and it is in class 'n00' already")
    (folder / "train.csv").write_text(text + "n00_1.jpg,\n")
    one_line(lambda: load("miniimagenet", tmp_path), "train.csv, line 6 has no filename or no label: complete or remove it")


# --- what is not read is named, with what to do

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0"


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


@pytest.mark.parametrize("name, file, content, expected", [
    ("cifar100", "cifar100/train-00000-of-00001.parquet", b"PAR1",
     "found cifar100/train-00000-of-00001.parquet (a parquet file), which is not read: d = pandas.read_parquet("),
    ("cifar100", "cifar100/train", b"PAR1\x15", "found cifar100/train (a parquet file), which is not read"),
    ("cifar100", "cifar100/test.parquet", LFS, "found cifar100/test.parquet (a git-lfs pointer), which is not read: run `git lfs pull`"),
    ("cifar100", "cifar100/test.parquet", b"", "found cifar100/test.parquet (empty), which is not read: get it again"),
    ("cifar100", "cifar100/test.parquet", b"abc", "(another thing than its name says), which is not read: get it again"),
    ("tinyimagenet", "tinyimagenet.npz", npz(x=1), "found tinyimagenet.npz (an .npz), which is not read: z = np.load('tinyimagenet.npz')"),
    ("miniimagenet", "mini-imagenet/train_data.hdf5", b"\x89HDF\r\n\x1a\n", "found mini-imagenet/train_data.hdf5 (an HDF5 file)"),
    ("omniglot", "omniglot/data", b"\x89HDF\r\n\x1a\n", "found omniglot/data (an HDF5 file), which is not read: f = h5py.File("),
    ("miniimagenet", "miniimagenet/base.json", b"{}", "found miniimagenet/base.json (file lists), which is not read: write train.csv"),
    ("cifar_fs", "CIFAR-FS/CIFAR_FS_train.pickle", b"\x80\x02", "found CIFAR-FS/CIFAR_FS_train.pickle (a pickle)"),
    ("cifar100", "cifar-100-python.tar.gz", b"\x1f\x8b", "`relkd data get cifar100` unpacks it"),
    ("miniimagenet", "mini-imagenet.tar.xz", b"\xfd7zXZ\0", "(an xz archive), which is not read: unpack it: tar xf 'mini-im"),
    ("miniimagenet", "mini-imagenet.zip.001", b"PK\x03\x04", "(a zip in several parts), which is not read: join them"),
    ("miniimagenet", "mini-imagenet.rar", b"Rar!\x1a", "(a rar archive), which is not read: unpack it: 7z x 'mini-imagenet.rar'"),
    ("cifar10", "cifar10/train/frog/1.png", b"x",
     "found cifar10 (folders of images), which is not read: `relkd data import 'cifar10' OWN --size 32`"),
    ("photos", "photos.npz", npz(x=1), "data set 'photos' is not in"),
    ("photos", "photos/x_train", b"\x93NUMPY", "found photos/x_train (a .npy array), which is not read: call the four train_images.npy"),
    ("photos", "photos/x_train.npy", b"", "found photos/x_train.npy (Keras's names), which is not read: rename x_train"),
])
def test_what_lies_there_in_another_form_is_named(tmp_path, typed, name, file, content, expected):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(content)
    said = one_line(lambda: load(name, tmp_path), expected)
    assert len(said) < 1000 and finds(tmp_path, name)
    if name != "photos":
        assert any(f"{name:14} is not read from" in line for line in typed("data", "--data", tmp_path)[1].splitlines())


def test_a_folder_that_holds_nothing_known_is_said_to_hold_what_it_does(tmp_path):
    as_tree(tmp_path, {"photos/a.jpg": b"", "photos/notes.txt": b"", "photos/.DS_Store": b""})
    one_line(lambda: load("photos", tmp_path), "photos holds a.jpg, notes.txt: a data set of your own is four arrays, train_images.npy")
    folder = as_tree(tmp_path, {"cifar-10-batches-py/batches.meta": b"\x80\x02", "cifar-10-batches-py/test_batch": b"\x80\x02"})
    assert folder is None and finds(tmp_path, "cifar10") == [], "an incomplete folder is called that, not a pickle to be converted"


def test_near_looks_one_folder_up_and_down(tmp_path):
    for folder in ("cifar100/cifar-100-python", "data/CIFAR-100-python", "other/cifar-100-python"):
        (tmp_path / folder).mkdir(parents=True)
    found = [p.relative_to(tmp_path).as_posix() for p in near(tmp_path, "cifar100")]
    assert sorted(found) == ["cifar100", "cifar100/cifar-100-python", "data/CIFAR-100-python"]
    assert near(tmp_path / "cifar100" / "cifar-100-python", "cifar100") == [tmp_path / "cifar100" / "cifar-100-python"]


# --- arrays

@pytest.mark.parametrize("change, expected", [
    ({"train_images": lambda x: (x / 255).astype(np.float32)}, "np.save it again with x = (x * 255).round().astype(np.uint8)"),
    ({"train_images": lambda x: x.transpose(0, 3, 1, 2)}, "np.save it again with x = x.transpose(0, 2, 3, 1)"),
    ({"train_images": lambda x: x[..., 0]}, "np.save it again with x = x[..., None]"),
    ({"train_images": lambda x: x.astype(np.float32)}, "np.save it again with x = x.round().astype(np.uint8), if x is from 0 to 255"),
    ({"train_images": lambda x: x / 128 - 1}, "np.save it again with x = x * std + mean, as it was normalised"),
    ({"train_images": lambda x: x.astype(np.uint16) * 257}, "np.save it again with x = (x >> 8).astype(np.uint8)"),
    ({"train_images": lambda x: np.array([*x, None], object)[:-1]}, "holds Python objects, not numbers: np.save np.stack(list(x))"),
    ({"train_labels": lambda y: y - .5}, "np.save it again with class numbers: it holds NaN or fractions"),
    ({"train_labels": lambda y: np.where(y == 0, np.nan, y)}, "np.save it again with class numbers: it holds NaN or fractions"),
    ({"train_labels": lambda y: y.astype(int) - 1}, "got -1 to 0: drop the images without a class"),
    ({"train_labels": lambda y: y.astype(object)}, "or np.array(list(y)) of labels"),
    ({"train_labels": lambda y: y[:, None]}, "np.save it again with y = y.ravel()"),
    ({"train_labels": lambda y: np.eye(2)[y]}, "np.save it again with y = y.argmax(1), if it is one-hot"),
    ({"train_labels": lambda y: y.astype(float)}, "np.save it again with y = y.astype(np.int64)"),
    ({"train_labels": lambda y: y.astype("U1")}, "np.save it again with names, y = np.unique(y, return_inverse=True)"),
    ({"train_labels": lambda y: y + 1, "test_labels": lambda y: y + 1},
     "hold 2 labels from 1 to 2, and must hold 0 to 1: np.save np.searchsorted"),
    ({"train_labels": lambda y: y * 7, "test_labels": lambda y: y * 7}, "hold 2 labels from 0 to 7, and must hold 0 to 1"),
])
def test_arrays_that_do_not_fit_are_refused_with_what_makes_them_fit(tmp_path, change, expected):
    folder = arrays(tmp_path / "own")
    for what, f in change.items():
        np.save(folder / f"{what}.npy", f(np.load(folder / f"{what}.npy")))
    one_line(lambda: load("own", tmp_path), expected)


def test_a_class_that_is_only_tested_a_constant_channel_and_an_odd_list_of_classes(tmp_path):
    folder = arrays(tmp_path / "own")
    np.save(folder / "test_labels.npy", np.array([0, 1, 2, 3]))
    with pytest.warns(UserWarning, match=r"holds no image of class 2, which is tested \(2 such classes\)"):
        load("own", tmp_path)
    x = np.load(arrays(tmp_path / "flat") / "train_images.npy")
    np.save(tmp_path / "flat" / "train_images.npy", np.concatenate([x[..., :2], x[..., 2:] * 0 + 7], -1))
    d = load("flat", tmp_path)
    with pytest.warns(UserWarning, match="channel 2 of flat is the same in all training images"):
        assert d.normalise(d.train_images).isfinite().all() and d.mean_std[1][2] == 1
    for text, names in ((b"\xef\xbb\xbfcat\r\ndog \r\n\r\n", ("cat", "dog")), (b"cat\ndog\n\n", ("cat", "dog"))):
        (tmp_path / "flat" / "classes.txt").write_bytes(text)
        assert load("flat", tmp_path).classes == names
    (tmp_path / "flat" / "classes.txt").write_text("cat\ncat\n")
    one_line(lambda: load("flat", tmp_path), "classes.txt names 'cat' twice")


# --- import, records, homes

def test_a_folder_is_imported_once(tmp_path, typed):
    for split, n in (("train", 3), ("val", 2), ("test", 1)):
        for c in ("ant", "bee"):
            for i in range(n):
                as_tree(tmp_path / "pets", {f"{split}/{c}/{i}.png": encoded(picture(i + len(c), 12 if i else 18))})
    code, out, err = typed("data", "import", tmp_path / "pets", "mine", "--size", "12", "--data", tmp_path / "data")
    assert code == 0 and "6 train, 4 val and 2 test images, 3 x 12 x 12, 2 classes" in out
    assert load("mine", tmp_path / "data").fingerprint == load(str(tmp_path / "pets"), size=12).fingerprint
    assert "mine" in {e["name"] for e in inventory(tmp_path / "data")}
    one_line(lambda: import_folder(tmp_path / "pets", "mine", tmp_path / "data", 12), "is there already")
    one_line(lambda: import_folder(tmp_path / "pets" / "train", "x", tmp_path), "must hold train/CLASS/")


def test_a_cell_counts_once(tmp_path):
    folder = tmp_path / "records" / "toy"
    folder.mkdir(parents=True)
    record = {"version": 2, "recipe": "toy", "row": "RKD-D", "variant": {"shot": 5}, "seed": 3, "run": digest({}),
              "headline": "top-1", "last": 55., "tests": {"top-1": {"accuracy": 55.}}, "protocol": {}, "epochs": []}
    (folder / "rkd-d-5-shot-seed3.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode())
    (folder / "rkd-d-5-shot-seed3 (1).json").write_text(json.dumps(record))
    (folder / "._rkd-d-5-shot-seed3.json").write_bytes(APPLE)
    assert load_records(tmp_path, "toy") == [record]
    (folder / "rkd-d-5-shot-seed3 (1).json").write_text(json.dumps(record | {"seconds": 60.}))
    one_line(lambda: load_records(tmp_path, "toy"), "rkd-d-5-shot-seed3 (1).json", "rkd-d-5-shot-seed3.json",
             "are two records of one cell, and differ")


def test_nothing_that_is_read_is_read_by_a_call_that_will_be_removed(tmp_path):
    from relkd.models import create, load_into

    tiny(tmp_path)
    copy(tmp_path)
    arrays(tmp_path / "own")
    torch.save(create("resnet8", 10).state_dict(), tmp_path / "t.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for name in ("tinyimagenet", "miniimagenet", "own"):
            load(name, tmp_path)
        load_into(create("resnet8", 10), tmp_path / "t.pth")


def test_seeds_that_one_row_lacks_are_named():
    from relkd.tables.paired import lacking

    def record(row, seed):
        return {"row": row, "seed": seed, "tests": {"top-1": {"accuracy": 50.}}}
    records = [record("Student", s) for s in range(4)] + [record("RKD-D", s) for s in (0, 2)] + [record("Teacher", 0)]
    assert lacking(records) == ["RKD-D has no record of seeds 1, 3 in top-1"] and lacking(records[:4]) == []


def test_a_home_is_no_folder_called_tilde(tmp_path, typed, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    arrays(tmp_path / "home" / "data" / "own")
    assert "own" in typed("data", "--data=~/data")[1]
    assert "(there is no such folder)" in typed("data", "--data", tmp_path / "dta")[1]
    monkeypatch.setenv("RELKD_DATA", '"~/data"')
    assert "own" in typed("data")[1] and load("own").classes == ("0", "1")
    code, _, err = typed("table", "digits", "--out=~/new")
    assert code == 2 and str(tmp_path / "home" / "new") in err and not (tmp_path / "~").exists()
