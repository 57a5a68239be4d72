"""Where data lie and how they get there: plain arrays, publishers' layouts, archives and downloads that are not whole, the inventory."""
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
import time
import zipfile
import zlib
from functools import partial
from http.client import BadStatusLine, IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_helpers import ALPHABETS, IDS, REAL, arrays, decoded, jpeg, omniglot_arrays, one_line, tiny
from relkd.data import (CLASSES, HELD_OUT, PLAIN, SUPERCLASSES, Source, area_resize, check_name, data_root, digits,
                        download, fetch, inventory, load)
from relkd.data import catalogue, entries, tinyimagenet
from relkd.data.omniglot import HELD_OUT_ALPHABETS
from relkd.data.source import looking_in


def test_the_root_is_the_argument_then_the_environment_then_dot_data(monkeypatch, tmp_path):
    monkeypatch.delenv("RELKD_DATA", raising=False)
    assert data_root() == Path(".data")
    monkeypatch.setenv("RELKD_DATA", str(tmp_path))
    assert data_root() == tmp_path and data_root("x") == Path("x")
    arrays(tmp_path / "own")
    assert load("own").counts == {"train": 6, "test": 4} and load("digits").name == "digits"


def test_a_runs_root_reaches_data_that_are_a_function(tmp_path, monkeypatch):
    from helpers import toy
    from relkd.tables.experiment import Experiment
    from relkd.train import Session

    monkeypatch.delenv("RELKD_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    arrays(tmp_path / "far" / "own", n=(60, 20), shape=(8, 8, 1))
    r = toy(data=lambda: load("own"))
    one_line(lambda: Experiment(r, Session(out=tmp_path, device="cpu")), "unknown data set 'own'")
    e = Experiment(r, Session(out=tmp_path, device="cpu", root=tmp_path / "far"))
    assert e.data.fingerprint == load("own", tmp_path / "far").fingerprint and data_root() == Path(".data")
    with looking_in("a"):
        with looking_in(None):
            assert data_root() == Path("a") and data_root("b") == Path("b")
    assert data_root() == Path(".data")


def test_plain_arrays_become_tensors(tmp_path):
    folder = arrays(tmp_path / "own")
    (folder / "classes.txt").write_text("left\nright\n")
    data = load("own", tmp_path)
    raw = np.load(folder / "train_images.npy")
    assert not data.by_class and data.classes == ("left", "right") and data.train_images.is_contiguous()
    assert np.array_equal(data.train_images.numpy(), raw.transpose(0, 3, 1, 2)) and data.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
    data.train_images.zero_()                                                    # a private copy: the file keeps its bytes
    assert np.array_equal(np.load(folder / "train_images.npy"), raw)


def test_grey_arrays_keep_their_file_too(tmp_path):
    folder = arrays(tmp_path / "own", shape=(5, 7, 1))
    raw = np.load(folder / "test_images.npy")
    load("own", tmp_path).test_images.zero_()
    assert raw.any() and np.array_equal(np.load(folder / "test_images.npy"), raw)


def bytes_of(change):
    def of(folder):
        path = folder / "train_images.npy"
        path.write_bytes(change(path.read_bytes()))
    return of


def rewrite(name, array):
    return lambda folder: np.save(folder / name, array)


@pytest.mark.parametrize("spoil, expected", [
    (lambda f: (f / "test_labels.npy").unlink(), ["looked for own/{train,test}_{images,labels}.npy", "(own/test_labels.npy missing)"]),
    (lambda f: (f / "train_images.npy").write_bytes((f / "train_images.npy").read_bytes()[:300]),
     ["train_images.npy is not a whole .npy file"]),
    (lambda f: (f / "train_labels.npy").write_bytes(b""), ["train_labels.npy is not a whole .npy file"]),
    (rewrite("train_labels.npy", np.array([{}] * 6, dtype=object)), ["train_labels.npy holds Python objects, not numbers"]),
    (bytes_of(lambda b: b + b"x"), ["is not a whole .npy file (759 bytes, 758 are due): make it again"]),
    (bytes_of(lambda b: b.replace(b"(6,", b"(-1")), ["train_images.npy is not a whole .npy file"]),
    (bytes_of(lambda b: b.replace(b"{'d", b"\0\xff(")), ["train_images.npy is not a whole .npy file"]),
    (rewrite("train_images.npy", np.zeros((6, 3, 5, 7), np.uint8)),
     ["must hold uint8 images (N, H, W, C) with 1 or 3 channels; got uint8 (6, 3, 5, 7)"]),
    (rewrite("train_images.npy", np.zeros((6, 5, 7, 3))), ["got float64 (6, 5, 7, 3)"]),
    (rewrite("test_images.npy", np.zeros((4, 5, 8, 3), np.uint8)), ["must have one shape; got (5, 7, 3) and (5, 8, 3)"]),
    (rewrite("train_labels.npy", np.zeros(5, int)), ["must hold 6 integer labels; got int64 (5,)"]),
    (rewrite("train_labels.npy", np.zeros(6)), ["must hold 6 integer labels; got float64 (6,)"]),
    (rewrite("train_labels.npy", np.array([0, 1, 2, 0, 1, -1])), ["labels from 0 to ...; got -1 to 2"]),
    (lambda f: (f / "classes.txt").write_text("only\n"), ["labels from 0 to 0; got 0 to 1"]),
])
def test_plain_arrays_that_are_wrong(tmp_path, spoil, expected):
    spoil(arrays(tmp_path / "own"))
    one_line(lambda: load("own", tmp_path), *expected)


def test_every_set_that_is_missing_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    for name in ("cifar10", "cifar100", "tinyimagenet", "omniglot", "cifar_fs", "fc100", "miniimagenet"):
        got = {"cifar_fs": "cifar100", "fc100": "cifar100"}.get(name, name)
        one_line(lambda: load(name, tmp_path), f"data set {name!r} is not in {tmp_path}: looked for ", "RELKD_DATA",
                 f"`relkd data get {got}`" if name != "miniimagenet" else "place your copy there")
    assert "cifar-100-python/" in one_line(lambda: load("fc100", tmp_path), "cifar100/{train,test}_{images,labels}.npy")
    one_line(lambda: load("tinyimagnet", tmp_path), "unknown data set 'tinyimagnet': did you mean 'tinyimagenet'?")
    one_line(lambda: load("../own", tmp_path), "unknown data set '../own'")
    one_line(lambda: fetch("miniimagenet", tmp_path), "miniimagenet cannot be downloaded; place your copy there")
    assert not list(tmp_path.iterdir())


def test_class_names():
    assert len(CLASSES["cifar100"]) == len(set(CLASSES["cifar100"])) == 100 and len(CLASSES["cifar10"]) == 10
    assert {len(v) for v in SUPERCLASSES.values()} == {5} and len(SUPERCLASSES) == 20
    assert (CLASSES["cifar100"][0], CLASSES["cifar100"][43], CLASSES["cifar100"][99]) == ("apple", "lion", "worm")


@pytest.mark.parametrize("change, expected", [
    (lambda c: [c[1], c[0], *c[2:]], "classes.txt has 'automobile' where 'airplane' is due"),
    (lambda c: c[:9], "classes.txt has None where 'truck' is due"),
    (lambda c: [*c, "van"], "classes.txt has 'van' where None is due"),
])
def test_classes_of_cifar_in_another_order(tmp_path, change, expected):
    folder = arrays(tmp_path / "cifar10", shape=(32, 32, 3), classes=10)
    (folder / "classes.txt").write_text("\n".join(change(list(CLASSES["cifar10"]))))
    one_line(lambda: load("cifar10", tmp_path), "must be torchvision's, in its order", expected)


@pytest.fixture
def torchvision_cifar(tmp_path, monkeypatch):
    """CIFAR-100 in torchvision's layout, three images and two; its checksums are told to torchvision."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def dump(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    images = {n: rng.integers(0, 256, (k, 3072), dtype=np.uint8) for n, k in (("train", 3), ("test", 2))}
    monkeypatch.setattr(CIFAR100, "train_list", [dump("train", {"data": images["train"], "fine_labels": [5, 0, 99]})])
    monkeypatch.setattr(CIFAR100, "test_list", [dump("test", {"data": images["test"], "fine_labels": [1, 2]})])
    key, md5 = dump("meta", {"fine_label_names": list(CLASSES["cifar100"])})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": key, "key": "fine_label_names", "md5": md5})
    return tmp_path, images


def test_torchvisions_cifar_and_the_same_as_plain_arrays(torchvision_cifar):
    root, images = torchvision_cifar
    data = load("cifar100", root)
    assert (np.array_equal(data.train_images.numpy().reshape(3, -1), images["train"])
            and data.train_labels.tolist() == [5, 0, 99] and data.classes == CLASSES["cifar100"])
    (root / "cifar100").mkdir()
    for name, array in zip(PLAIN, (data.train_images.permute(0, 2, 3, 1), data.train_labels,
                                   data.test_images.permute(0, 2, 3, 1), data.test_labels)):
        np.save(root / "cifar100" / name, array.numpy())
    (root / "cifar-100-python" / "train").unlink()                               # so that the arrays are what is read
    assert load("cifar100", root).fingerprint == data.fingerprint and fetch("cifar100", root).fingerprint == data.fingerprint


def test_a_damaged_cifar_of_torchvision(torchvision_cifar):
    root, _ = torchvision_cifar
    (root / "cifar-100-python" / "test").write_bytes(b"x")
    one_line(lambda: load("cifar100", root), "cifar-100-python is damaged or not whole", "`relkd data get cifar100`")


@pytest.mark.parametrize("error", [OSError("no route\nto host"), IncompleteRead(b"x"), tarfile.ReadError("x"), BadStatusLine("x"),
                                   zlib.error("bad"), TimeoutError("timed out")])
def test_a_download_by_torchvision_that_fails(tmp_path, monkeypatch, error):
    from torchvision.datasets import CIFAR10

    def fail(self):
        waits.append(socket.getdefaulttimeout())
        raise error

    waits = []
    monkeypatch.setattr(CIFAR10, "download", fail)
    one_line(lambda: fetch("cifar10", tmp_path), "cifar10 could not be downloaded into",
             "): try again, or place the files there; what is read there: ", "cifar-10-batches-py/")
    assert waits == [60] and socket.getdefaulttimeout() is None


@pytest.mark.skipif(not (REAL / "cifar100").is_dir(), reason="CIFAR-100 is not here")
def test_the_real_cifar100():
    data = load("cifar100", REAL)
    assert [round(m, 4) for m in data.mean_std[0].flatten().tolist()] == [.5071, .4865, .4409]
    assert data.counts == {"train": 50000, "test": 10000} and data.classes == CLASSES["cifar100"]
    assert data.train_labels.bincount().eq(500).all() and data.test_labels.bincount().eq(100).all()
    fs, fc = load("cifar_fs", REAL), load("fc100", REAL)
    assert fs.counts == {"train": 38400, "val": 9600, "test": 12000} and fc.counts == {"train": 36000, "val": 12000, "test": 12000}
    assert ([d.fingerprint[:12] for d in (data, fs, fc)] == ["12350f9802b1", "65134b370416", "f6b94ccfdc1d"]
            and torch.equal(fs.images, fc.images) and fs.labels.bincount().eq(600).all())


def test_the_published_splits_of_cifar100():
    parts = {n: {s: t.split() for s, t in held.items()} for n, held in {**HELD_OUT, "omniglot": HELD_OUT_ALPHABETS}.items()}
    assert ([len(set(parts["cifar_fs"][s])) for s in ("val", "test")] == [16, 20]
            and set(sum(parts["cifar_fs"].values(), [])) <= set(CLASSES["cifar100"]))
    assert [len(set(parts["fc100"][s])) for s in ("val", "test")] == [4, 4] and set(sum(parts["fc100"].values(), [])) <= set(SUPERCLASSES)
    assert all(set(p["val"]).isdisjoint(p["test"]) for p in parts.values())


def test_tiny_imagenet_is_read_from_the_zip_once(tmp_path):
    root = tmp_path / "data"
    tiny(root)
    data = load("tinyimagenet", root)
    assert data.classes == ("n01443537 goldfish", "n02124075 Egyptian cat") and data.train_images.shape == (6, 3, 64, 64)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test_labels.tolist() == [1, 0, 1, 0]
    for got, content in [(data.train_images[0], jpeg(10)), (data.train_images[2], jpeg(12, "L")),
                         (data.train_images[5], jpeg(2)), (data.test_images[3], jpeg(53))]:
        assert np.array_equal(got.permute(1, 2, 0).numpy(), decoded(content))
    assert torch.equal(data.train_images[2, 0], data.train_images[2, 2])
    assert not list(tmp_path.rglob("*evil*")) and sorted(p.name for p in root.iterdir()) == ["tiny-imagenet-200.zip", "tinyimagenet"]
    (root / "tiny-imagenet-200.zip").unlink()
    assert load("tinyimagenet", root).fingerprint == data.fingerprint == fetch("tinyimagenet", root).fingerprint


@pytest.mark.parametrize("change, expected", [
    ({"train/n01443537/images/n01443537_1.JPEG": b"no image"},
     "image tiny-imagenet-200/train/n01443537/images/n01443537_1.JPEG is missing or damaged (UnidentifiedImageError): "
     "get the file again"),
    ({"val/images/val_2.JPEG": jpeg(1)[:400]}, "image tiny-imagenet-200/val/images/val_2.JPEG is missing or damaged"),
    ({"val/images/val_2.JPEG": None}, "image tiny-imagenet-200/val/images/val_2.JPEG is missing or damaged (KeyError)"),
    ({"val/images/val_0.JPEG": jpeg(1, size=32)}, "val_0.JPEG must have 64 x 64 pixels; got 32 x 32"),
    ({"val/val_annotations.txt": "../../evil.JPEG\tn01443537\n"},
     "image tiny-imagenet-200/val/images/../../evil.JPEG is missing or damaged (KeyError)"),
    ({"val/val_annotations.txt": "val_0.JPEG\tn05555555\n"}, "holds no training image of class n05555555: it is not whole"),
    ({"val/val_annotations.txt": None}, "holds no tiny-imagenet-200/val/val_annotations.txt: it is not the publisher's"),
    ({"val/val_annotations.txt": "val_0.JPEG\n"}, "holds no training image of class val_0.JPEG"),
    ({"wnids.txt": "\n".join([*IDS, "n07777777"])}, "holds no training image of class n07777777"),
    ({f"train/{w}/images/{w}_{i}.JPEG": None for w in IDS for i in range(3)}, "holds no tiny-imagenet-200/train/*/images/*.JPEG"),
])
def test_a_tiny_imagenet_that_is_not_the_publishers(tmp_path, change, expected):
    path = tiny(tmp_path, **change)
    one_line(lambda: load("tinyimagenet", tmp_path), str(path), expected)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a half-made cache was left"


def test_a_zip_that_was_cut_or_tampered_with(tmp_path):
    path = tiny(tmp_path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as z:
        offset = z.getinfo("tiny-imagenet-200/val/images/val_3.JPEG").header_offset
        notes = z.getinfo("tiny-imagenet-200/val/val_annotations.txt").header_offset
    for spot, name in ((offset + 500, "image tiny-imagenet-200/val/images/val_3.JPEG is missing or damaged"),
                       (notes + 80, "val/val_annotations.txt is damaged")):
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 0x55]) + whole[spot + 1:])
        one_line(lambda: load("tinyimagenet", tmp_path), str(path), name, "get the file again")
    for cut in (whole[:len(whole) // 2], whole[:-10], b""):
        path.write_bytes(cut)
        one_line(lambda: load("tinyimagenet", tmp_path), f"{path} is not a whole zip archive", "remove it and get it again")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_a_kill_left_of_an_unpacking_is_removed_after_an_hour(tmp_path):
    tiny(tmp_path)
    for name, age in (("tinyimagenet.old.tmp", 4000), ("tinyimagenet.young.tmp", 60), ("other.old.tmp", 4000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.npy").write_bytes(b"x")
        for p in (tmp_path / name / "x.npy", tmp_path / name):
            os.utime(p, (time.time() - age,) * 2)
    load("tinyimagenet", tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.tmp")) == ["other.old.tmp", "tinyimagenet.young.tmp"]


def test_an_archive_that_would_unpack_to_gigabytes_is_refused_unread(tmp_path, monkeypatch):
    path = tiny(tmp_path)
    monkeypatch.setattr(entries, "LARGEST", 100)
    one_line(lambda: load("tinyimagenet", tmp_path), f"{path} holds tiny-imagenet-200/", "which would unpack to",
             "no image or list is that large")


def test_a_cache_that_cannot_be_written_or_is_in_the_way(tmp_path, monkeypatch):
    tiny(tmp_path)
    (tmp_path / "tinyimagenet").mkdir()
    (tmp_path / "tinyimagenet" / "train_images.npy").write_bytes(b"half")
    one_line(lambda: load("tinyimagenet", tmp_path), f"cannot write {tmp_path / 'tinyimagenet'}", "remove what is there")
    shutil.rmtree(tmp_path / "tinyimagenet")
    monkeypatch.setattr(np, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    one_line(lambda: load("tinyimagenet", tmp_path), "No space left on device", "RELKD_DATA")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]


def test_two_processes_that_decode_at_once(tmp_path):
    tiny(tmp_path)
    results = []
    threads = [threading.Thread(target=lambda: results.append(load("tinyimagenet", tmp_path).fingerprint)) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert (len(results) == 4 and len(set(results)) == 1
            and sorted(p.name for p in tmp_path.iterdir()) == ["tiny-imagenet-200.zip", "tinyimagenet"])


def test_omniglot_is_shrunk_turned_and_split(tmp_path):
    images, rows = omniglot_arrays(tmp_path)
    f = load("omniglot", tmp_path)
    assert f.images.shape == (64, 1, 28, 28) and len(f.classes) == 32 and f.counts == {"train": 24, "val": 16, "test": 24}
    names = {s: {f.classes[i] for i in ids} for s, ids in f.splits.items()}
    assert ("Gurmukhi/character01/rot000" in names["train"] and "Gurmukhi/character45/rot270" in names["test"]
            and "Hebrew/character02/rot090" in names["val"])
    for i in (0, 7, 15):
        for k in range(4):
            want = area_resize(torch.from_numpy(np.rot90(images[i], k).copy())[None, None] * 255, 28)[0]
            assert ((f.images[i + 16 * k].int() - want.int()).abs().max() <= 1
                    and f.classes[f.labels[i + 16 * k]] == f"{rows[i // 2][1]}/{rows[i // 2][2]}/rot{90 * k:03}")


def test_omniglot_from_torchvisions_zips(tmp_path):
    images, rows = omniglot_arrays(tmp_path / "plain")
    root = tmp_path / "root"
    (root / "omniglot-py").mkdir(parents=True)
    for subset in ALPHABETS:
        with zipfile.ZipFile(root / "omniglot-py" / f"{subset}.zip", "w") as z:
            z.writestr(f"{subset}/../../evil/character01/0_0.png", b"x")
            for n, (s, a, c) in enumerate(rows):
                for d in (0, 1) if s == subset else ():
                    out = io.BytesIO()
                    Image.fromarray(images[2 * n + d] == 0).convert("1").save(out, "PNG")    # ink is black
                    z.writestr(f"{s}/{a}/{c}/{n:04}_{d:02}.png", out.getvalue())
    got, want = load("omniglot", root), load("omniglot", tmp_path / "plain")
    key = lambda f: {(f.classes[y], x.numpy().tobytes()) for x, y in zip(f.images, f.labels)}    # noqa: E731
    # labels follow the sorted alphabets
    assert key(got) == key(want) and np.load(root / "omniglot" / "images.npy").max() == 1
    shutil.rmtree(root / "omniglot-py")
    assert load("omniglot", root).fingerprint == got.fingerprint


@pytest.mark.parametrize("spoil, expected", [
    (lambda f: (f / "characters.csv").write_text("label,alphabet\n0,Latin\n"),
     "characters.csv must have rows with the columns label, alphabet, character"),
    (lambda f: (f / "characters.csv").write_text("label,alphabet,character\n0,Latin,c\n0,Latin,d\n"),
     "one row for each label from 0 to 1; got 0, 0 ..."),
    (lambda f: (f / "characters.csv").write_text("label,alphabet,character\n0,Latin,c\n"), "labels from 0 to 0; got 0 to 7"),
    (lambda f: (f / "characters.csv").write_bytes(b"\xff\xfe"), "characters.csv cannot be read"),
    (lambda f: np.save(f / "labels.npy", np.zeros(3, int)), "must hold 16 integer labels"),
    (lambda f: (f / "characters.csv").write_text((f / "characters.csv").read_text().replace("Hebrew", "Klingon")),
     "omniglot has no class in split 'val'"),
])
def test_omniglot_arrays_that_are_wrong(tmp_path, spoil, expected):
    omniglot_arrays(tmp_path)
    spoil(tmp_path / "omniglot")
    one_line(lambda: load("omniglot", tmp_path), expected)


@pytest.mark.skipif(not (REAL / "omniglot").is_dir(), reason="Omniglot is not here")
def test_the_real_omniglot():
    f = load("omniglot", REAL)
    assert {s: len(ids) for s, ids in f.splits.items()} == {"train": 4 * 1028, "val": 4 * 172, "test": 4 * 423}
    assert f.labels.bincount().eq(20).all() and f.images.amax() == 255
    assert f.fingerprint[:12] == "bf582e1b62a3" and load("omniglot", REAL, resize="nearest").fingerprint[:12] == "649a137971e6"


def mini(root):
    folder = root / "miniimagenet"
    (folder / "images").mkdir(parents=True)
    for k, split in enumerate(("train", "val", "test")):
        lines = ["filename,label"]
        for i in range(4):
            name = f"n0{k}00{i % 2}_{i}.jpg"
            (folder / "images" / name).write_bytes(jpeg(10 * k + i, size=84 if i else 120))
            lines.append(f"{name},n0{k}00{i % 2}")
        (folder / f"{split}.csv").write_text("\n".join(lines))
    return folder


def test_miniimagenet_is_decoded_once(tmp_path):
    folder = mini(tmp_path)
    f = load("miniimagenet", tmp_path)
    assert f.images.shape == (12, 3, 84, 84) and f.splits == {"train": (0, 1), "val": (2, 3), "test": (4, 5)} and f.classes[3] == "n01001"
    assert np.array_equal(f.images[1].permute(1, 2, 0).numpy(), decoded(jpeg(1, size=84)))
    resized = np.asarray(Image.open(io.BytesIO(jpeg(0, size=120))).resize((84, 84), Image.BILINEAR))
    assert np.abs(f.images[0].permute(1, 2, 0).numpy().astype(int) - resized).max() <= 3
    shutil.rmtree(folder / "images")
    assert load("miniimagenet", tmp_path).fingerprint == f.fingerprint


@pytest.mark.parametrize("spoil, expected", [
    (lambda f: (f / "val.csv").unlink(), "(miniimagenet/arrays/images.npy"),
    (lambda f: (f / "val.csv").write_text("file,label\na,b\n"), "val.csv must have rows with the columns filename, label"),
    (lambda f: (f / "val.csv").write_text("filename,label\n../train.csv,b\n"),
     "val.csv must name files inside images/; got '../train.csv'"),
    (lambda f: (f / "val.csv").write_text("filename,label\nx.jpg,b\n"), "image x.jpg is missing or damaged (FileNotFoundError)"),
    (lambda f: (f / "test.csv").write_text("filename,label\nn00000_0.jpg,n00000\n"), "test.csv shares class 'n00000' with another list"),
])
def test_a_miniimagenet_that_is_not_whole(tmp_path, spoil, expected):
    folder = mini(tmp_path)
    spoil(folder)
    if "arrays" in expected:
        expected = "(miniimagenet/val.csv missing)"
    one_line(lambda: load("miniimagenet", tmp_path), expected)
    assert not list(folder.glob("arrays*"))


# --- downloads

CONTENT = np.random.default_rng(1).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A publisher on 127.0.0.1 with file.bin and cut.bin, of which it sends half of what it promises."""
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

        def do_GET(self):
            if "cut" not in self.path:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:100_000])

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = tmp_path / "site"
    site.mkdir()
    (site / "file.bin").write_bytes(CONTENT)
    s = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}", site
    s.shutdown()
    s.server_close()


def test_a_download_is_whole_or_not_there(server, tmp_path):
    url, site = server
    to = tmp_path / "new" / "file.bin"
    assert download(f"{url}/file.bin", to, MD5) == to and to.read_bytes() == CONTENT
    (site / "file.bin").unlink()
    assert download(f"{url}/file.bin", to, MD5) == to                            # it is there: nothing is asked
    one_line(lambda: download(f"{url}/file.bin", to.with_name("b"), MD5),
             f"the download of {url}/file.bin to {to.with_name('b')} failed (404", "try again")
    one_line(lambda: download(f"{url}/cut.bin", to.with_name("c"), MD5), f"{url}/cut.bin", "try again")
    assert [p.name for p in to.parent.iterdir()] == ["file.bin"]


def test_several_downloads_of_one_file_survive_each_other(server, tmp_path):
    """The fault: the loser of two ended in a traceback when the winner had moved the part away."""
    url, _ = server
    to = tmp_path / "new" / "file.bin"
    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(lambda _: download(f"{url}/file.bin", to, MD5), range(12))) == {to}
    assert to.read_bytes() == CONTENT and [p.name for p in to.parent.iterdir()] == ["file.bin"]


def test_a_download_of_another_file(server, tmp_path):
    url, _ = server
    one_line(lambda: download(f"{url}/file.bin", tmp_path / "x" / "file.bin", "0" * 32),
             f"{url}/file.bin sent another file", "not " + "0" * 32)
    assert not list((tmp_path / "x").iterdir())


def test_a_server_that_is_not_there_and_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    one_line(lambda: download("http://127.0.0.1:9/file.bin", tmp_path / "file.bin", MD5),
             f"the download of http://127.0.0.1:9/file.bin to {tmp_path / 'file.bin'} failed", "try again")
    (tmp_path / "file").write_text("")
    one_line(lambda: download("http://127.0.0.1:9/file.bin", tmp_path / "file" / "x" / "file.bin", MD5), "failed")


def test_fetching_tiny_imagenet_downloads_decodes_and_loads(server, tmp_path, monkeypatch):
    url, site = server
    content = tiny(site).read_bytes()
    monkeypatch.setattr(tinyimagenet, "TINY", {"url": f"{url}/tiny-imagenet-200.zip", "md5": hashlib.md5(content).hexdigest()})
    data = fetch("tinyimagenet", tmp_path / "mine")
    assert data.counts == {"train": 6, "test": 4} and fetch("tinyimagenet", tmp_path / "mine").fingerprint == data.fingerprint
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["tiny-imagenet-200.zip", "tinyimagenet"]


def test_a_name_is_checked_without_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "__call__", lambda *a, **k: pytest.fail("it was read"))
    arrays(tmp_path / "own")
    (tmp_path / "own" / "train_images.npy").write_bytes(b"damaged, but there")
    check_name("own", tmp_path)
    check_name("digits", tmp_path, test=300)
    for name, options, expected in [("onw", {}, "unknown data set 'onw': did you mean 'own'?"),
                                    ("cifar10", {}, "data set 'cifar10' is not in"),
                                    ("digits", {"size": 8}, "data set 'digits' has no option 'size': it has test, seed"),
                                    ("own", {"size": 8}, "it has none")]:
        one_line(lambda: check_name(name, tmp_path, **options), expected)


# --- inventory

def test_the_inventory_reads_again_only_what_changed(tmp_path, monkeypatch):
    arrays(tmp_path / "own")
    omniglot_arrays(tmp_path)
    first = inventory(tmp_path)
    by_name = {e["name"]: e for e in first}
    assert [*by_name] == ["digits", "omniglot", "own"] and by_name["own"]["fingerprint"] == load("own", tmp_path).fingerprint
    assert by_name["own"] == {"name": "own", "by_class": False, "counts": {"train": 6, "test": 4}, "shape": [3, 5, 7],
                              "classes": 2, "fingerprint": by_name["own"]["fingerprint"]}
    assert by_name["omniglot"]["by_class"] and by_name["digits"]["fingerprint"] == digits().fingerprint
    read = []
    entry = catalogue._entry
    monkeypatch.setattr(catalogue, "_entry", lambda name, *a: read.append(name) or entry(name, *a))
    assert inventory(tmp_path) == first and read == []
    arrays(tmp_path / "own", seed=1)
    os.utime(tmp_path / "own" / "train_images.npy", ns=(1, 1))
    again = {e["name"]: e for e in inventory(tmp_path)}
    assert read == ["own"] and again["own"]["fingerprint"] != by_name["own"]["fingerprint"] and again["omniglot"] == by_name["omniglot"]
    for broken in ("{", "[]", json.dumps({"own": 1})[:-1]):
        (tmp_path / "inventory.json").write_text(broken)
        assert {e["name"]: e for e in inventory(tmp_path)} == again
    (tmp_path / "own" / "train_labels.npy").write_bytes(b"")
    assert "is not a whole .npy file" in {e["name"]: e for e in inventory(tmp_path)}["own"]["error"]
    assert not list(tmp_path.glob("*.tmp"))


def test_other_content_of_equal_size_and_time_is_read_again(tmp_path):
    """The fault: `cp -p` over a file, and the inventory showed the old fingerprint."""
    arrays(tmp_path / "own")
    first, path = {e["name"]: e for e in inventory(tmp_path)}, tmp_path / "own" / "train_images.npy"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert {e["name"]: e for e in inventory(tmp_path)}["own"]["fingerprint"] != first["own"]["fingerprint"]


@pytest.mark.parametrize("change", [{"counts": {"train": 10**9}}, {"fingerprint": "0" * 64}, {"shape": ["x"]}])
def test_a_forged_entry_of_the_inventory_is_read_again(tmp_path, change):
    arrays(tmp_path / "own")
    want, path = inventory(tmp_path), tmp_path / "inventory.json"
    known = json.loads(path.read_text())
    known["own"]["entry"] |= change
    path.write_text(json.dumps(known))
    assert inventory(tmp_path) == want


@pytest.mark.parametrize("entry", [None, {}, {"name": "own"}, {"name": "other", "error": "x"}, {"name": "own", "error": 5}])
def test_an_inventory_that_somebody_edited_is_read_again(tmp_path, entry):
    arrays(tmp_path / "own")
    want, path = inventory(tmp_path), tmp_path / "inventory.json"
    known = json.loads(path.read_text())
    known["own"]["entry"] = entry
    path.write_text(json.dumps(known))
    assert inventory(tmp_path) == want


def test_the_inventory_of_a_folder_that_is_not_there(tmp_path):
    assert [e["name"] for e in inventory(tmp_path / "none")] == ["digits"] and not list(tmp_path.iterdir())


def test_a_source_reads_the_first_place_that_is_whole(tmp_path):
    def place(n):
        return f"place {n}", (f"{n}a", f"{n}b"), lambda root, name: (name, n)

    source = Source("s", (place(1), place(2)), "make it")
    (tmp_path / "1a").touch(), (tmp_path / "2a").touch(), (tmp_path / "2b").touch()
    assert source(tmp_path) == ("s", 2)
    (tmp_path / "1b").touch()
    assert source(tmp_path) == ("s", 1)
    (tmp_path / "1b").unlink(), (tmp_path / "2b").unlink()
    one_line(lambda: source(tmp_path), "looked for place 1 and place 2 (1b, 2b missing); make it (RELKD_DATA names another folder)")
