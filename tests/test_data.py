"""Data: where they lie, archives and downloads that are not whole, few-shot splits, and augmentation against a loop over images."""
import hashlib
import io
import json
import os
import pickle
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import relkd.data
from relkd.data import CLASSES, HELD_OUT, PLAIN, SUPERCLASSES, Batches, Dataset, FewShot, Source, area_resize, colour_jitter, data_root, digits, download, fetch, inventory, load, rotate

REAL = data_root() if data_root().is_dir() else Path(__file__).resolve().parents[1] / ".data"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_line(call, *expected):
    with pytest.raises(ValueError) as e:
        call()
    assert "\n" not in str(e.value) and all(x in str(e.value) for x in expected), str(e.value)
    return str(e.value)


def arrays(folder, n=(6, 4), shape=(5, 7, 3), classes=2, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part, k in zip(("train", "test"), n):
        np.save(folder / f"{part}_images.npy", rng.integers(0, 256, (k, *shape), dtype=np.uint8))
        np.save(folder / f"{part}_labels.npy", (np.arange(k) % classes).astype(np.uint8))
    return folder


# --- the root, and plain arrays

def test_the_root_is_the_argument_then_the_environment_then_dot_data(monkeypatch, tmp_path):
    monkeypatch.delenv("RELKD_DATA", raising=False)
    assert data_root() == Path(".data")
    monkeypatch.setenv("RELKD_DATA", str(tmp_path))
    assert data_root() == tmp_path and data_root("x") == Path("x")
    arrays(tmp_path / "own")
    assert load("own").counts == {"train": 6, "test": 4} and load("digits").name == "digits"


def test_plain_arrays_become_tensors(tmp_path):
    folder = arrays(tmp_path / "own")
    (folder / "classes.txt").write_text("left\nright\n")
    data = load("own", tmp_path)
    raw = np.load(folder / "train_images.npy")
    assert isinstance(data, Dataset) and data.classes == ("left", "right") and data.train_images.is_contiguous()
    assert np.array_equal(data.train_images.numpy(), raw.transpose(0, 3, 1, 2)) and data.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
    data.train_images.zero_()                                                    # a private copy: the file keeps its bytes
    assert np.array_equal(np.load(folder / "train_images.npy"), raw)


def test_grey_arrays_keep_their_file_too(tmp_path):
    folder = arrays(tmp_path / "own", shape=(5, 7, 1))
    raw = np.load(folder / "test_images.npy")
    load("own", tmp_path).test_images.zero_()
    assert raw.any() and np.array_equal(np.load(folder / "test_images.npy"), raw)


def rewrite(name, array):
    return lambda folder: np.save(folder / name, array)


@pytest.mark.parametrize("spoil, expected", [
    (lambda f: (f / "test_labels.npy").unlink(), ["looked for own/{train,test}_{images,labels}.npy", "(own/test_labels.npy missing)"]),
    (lambda f: (f / "train_images.npy").write_bytes((f / "train_images.npy").read_bytes()[:300]), ["train_images.npy is not a whole .npy file"]),
    (lambda f: (f / "train_labels.npy").write_bytes(b""), ["train_labels.npy is not a whole .npy file"]),
    (rewrite("train_labels.npy", np.array([{}] * 6, dtype=object)), ["train_labels.npy is not a whole .npy file"]),
    (rewrite("train_images.npy", np.zeros((6, 3, 5, 7), np.uint8)), ["must hold uint8 images (N, H, W, C) with 1 or 3 channels; got uint8 (6, 3, 5, 7)"]),
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
        one_line(lambda: load(name, tmp_path), f"data set {name!r} is not in {tmp_path}: looked for ", "RELKD_DATA", f"`relkd data get {got}`" if name != "miniimagenet" else "place your copy there")
    assert "cifar-100-python/" in one_line(lambda: load("fc100", tmp_path), "cifar100/{train,test}_{images,labels}.npy")
    one_line(lambda: load("tinyimagnet", tmp_path), "unknown data set 'tinyimagnet': did you mean 'tinyimagenet'?")
    one_line(lambda: load("../own", tmp_path), "unknown data set '../own'")
    one_line(lambda: fetch("miniimagenet", tmp_path), "miniimagenet cannot be downloaded; place your copy there")
    assert not list(tmp_path.iterdir())


# --- CIFAR

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
    assert np.array_equal(data.train_images.numpy().reshape(3, -1), images["train"]) and data.train_labels.tolist() == [5, 0, 99] and data.classes == CLASSES["cifar100"]
    (root / "cifar100").mkdir()
    for name, array in zip(PLAIN, (data.train_images.permute(0, 2, 3, 1), data.train_labels, data.test_images.permute(0, 2, 3, 1), data.test_labels)):
        np.save(root / "cifar100" / name, array.numpy())
    (root / "cifar-100-python" / "train").unlink()                               # so that the arrays are what is read
    assert load("cifar100", root).fingerprint == data.fingerprint and fetch("cifar100", root).fingerprint == data.fingerprint


def test_a_damaged_cifar_of_torchvision(torchvision_cifar):
    root, _ = torchvision_cifar
    (root / "cifar-100-python" / "test").write_bytes(b"x")
    one_line(lambda: load("cifar100", root), "cifar-100-python is damaged or not whole", "`relkd data get cifar100`")


def test_a_download_by_torchvision_that_fails(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no route\nto host")))
    one_line(lambda: fetch("cifar10", tmp_path), "cifar10 could not be downloaded into", "(no route): try again, or place the files there")


@pytest.mark.skipif(not (REAL / "cifar100").is_dir(), reason="CIFAR-100 is not here")
def test_the_real_cifar100():
    data = load("cifar100", REAL)
    assert [round(m, 4) for m in data.mean_std[0].flatten().tolist()] == [.5071, .4865, .4409]
    assert data.counts == {"train": 50000, "test": 10000} and data.classes == CLASSES["cifar100"]
    assert data.train_labels.bincount().eq(500).all() and data.test_labels.bincount().eq(100).all()
    fs, fc = load("cifar_fs", REAL), load("fc100", REAL)
    assert fs.counts == {"train": 38400, "val": 9600, "test": 12000} and fc.counts == {"train": 36000, "val": 12000, "test": 12000}
    assert fs.fingerprint != fc.fingerprint and torch.equal(fs.images, fc.images) and fs.labels.bincount().eq(600).all()


# --- Tiny ImageNet

def jpeg(seed, mode="RGB", size=64):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size)).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


IDS = ("n02124075", "n01443537")


def tiny(root, **change):
    """The publisher's layout: two classes, 3 train and 2 val images each; one is grey, one path leaves the archive."""
    entries = {"wnids.txt": "\n".join(IDS) + "\n", "words.txt": "n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn09999999\tnot here\n",
               "val/val_annotations.txt": "".join(f"val_{i}.JPEG\t{IDS[i % 2]}\t0\t0\t62\t62\n" for i in range(4)), "test/images/test_0.JPEG": jpeg(99)}
    entries |= {f"train/{w}/images/{w}_{i}.JPEG": jpeg(10 * k + i, "L" if (k, i) == (1, 2) else "RGB") for k, w in enumerate(IDS) for i in range(3)}
    entries |= {f"train/{w}/{w}_boxes.txt": "x" for w in IDS} | {f"val/images/val_{i}.JPEG": jpeg(50 + i) for i in range(4)}
    entries |= {"../../evil.JPEG": jpeg(7), "train/../../evil/images/evil_0.JPEG": jpeg(8), "train/n01443537/images/../../../../evil_0.JPEG": jpeg(9)}
    root.mkdir(exist_ok=True)
    path = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in (entries | change).items():
            if content is not None:
                z.writestr(f"tiny-imagenet-200/{name}", content)
    return path


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_tiny_imagenet_is_read_from_the_zip_once(tmp_path):
    root = tmp_path / "data"
    tiny(root)
    data = load("tinyimagenet", root)
    assert data.classes == ("n01443537 goldfish", "n02124075 Egyptian cat") and data.train_images.shape == (6, 3, 64, 64)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test_labels.tolist() == [1, 0, 1, 0]
    for got, content in [(data.train_images[0], jpeg(10)), (data.train_images[2], jpeg(12, "L")), (data.train_images[5], jpeg(2)), (data.test_images[3], jpeg(53))]:
        assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - decoded(content)).max() <= 2        # Pillow's decoder may round otherwise
    assert torch.equal(data.train_images[2, 0], data.train_images[2, 2])
    assert not list(tmp_path.rglob("*evil*")) and sorted(p.name for p in root.iterdir()) == ["tiny-imagenet-200.zip", "tinyimagenet"]
    (root / "tiny-imagenet-200.zip").unlink()
    assert load("tinyimagenet", root).fingerprint == data.fingerprint == fetch("tinyimagenet", root).fingerprint


@pytest.mark.parametrize("change, expected", [
    ({"train/n01443537/images/n01443537_1.JPEG": b"no image"}, "image tiny-imagenet-200/train/n01443537/images/n01443537_1.JPEG is missing or damaged (RuntimeError): get the file again"),
    ({"val/images/val_2.JPEG": jpeg(1)[:400]}, "image tiny-imagenet-200/val/images/val_2.JPEG is missing or damaged"),
    ({"val/images/val_2.JPEG": None}, "image tiny-imagenet-200/val/images/val_2.JPEG is missing or damaged (KeyError)"),
    ({"val/images/val_0.JPEG": jpeg(1, size=32)}, "val_0.JPEG must have 64 x 64 pixels; got 32 x 32"),
    ({"val/val_annotations.txt": "../../evil.JPEG\tn01443537\n"}, "image tiny-imagenet-200/val/images/../../evil.JPEG is missing or damaged (KeyError)"),
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
    for spot, name in ((offset + 500, "image tiny-imagenet-200/val/images/val_3.JPEG is missing or damaged"), (notes + 80, "val/val_annotations.txt is damaged")):
        path.write_bytes(whole[:spot] + bytes([whole[spot] ^ 0x55]) + whole[spot + 1:])
        one_line(lambda: load("tinyimagenet", tmp_path), str(path), name, "get the file again")
    for cut in (whole[:len(whole) // 2], whole[:-10], b""):
        path.write_bytes(cut)
        one_line(lambda: load("tinyimagenet", tmp_path), f"{path} is not a whole zip archive", "remove it and get it again")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


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
    assert len(results) == 4 and len(set(results)) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["tiny-imagenet-200.zip", "tinyimagenet"]


# --- downloads

CONTENT = np.random.default_rng(1).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT on 127.0.0.1; knows ranges or not, and may break off after `limit` bytes of an answer."""

    def __init__(self, content=CONTENT, ranges=True, limit=None):
        self.content, self.ranges, self.limit, self.asked = content, ranges, limit, []
        super().__init__(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *a):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a):
        pass

    def do_GET(self):
        s, wanted = self.server, self.headers.get("Range")
        s.asked.append(wanted)
        start = int(wanted[6:-1]) if wanted and s.ranges else 0
        if start >= len(s.content):
            self.send_error(416)
            return
        body = s.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(s.content) - 1}/{len(s.content)}")
        self.end_headers()
        self.wfile.write(body[:s.limit])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_or_starts_over(tmp_path, ranges, capsys):
    to = tmp_path / "new" / "file.bin"
    with Server(ranges=ranges, limit=100_000) as s:
        message = one_line(lambda: download(s.url, to, len(CONTENT), MD5), s.url, "after 100,000 of 300,000 bytes", "try again, it goes on from there")
        assert not to.exists() and (to.parent / "file.bin.part").read_bytes() == CONTENT[:100_000] and message
        s.limit = None
        assert download(s.url, to, len(CONTENT), MD5, progress=True) == to and to.read_bytes() == CONTENT
        assert s.asked == [None, "bytes=100000-"] and not (to.parent / "file.bin.part").exists()
        assert download(s.url, to, len(CONTENT), MD5) == to and len(s.asked) == 2           # it is there: nothing is asked


def test_a_part_that_is_whole_too_long_or_beyond_the_servers_end(tmp_path):
    to, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    with Server() as s:
        part.write_bytes(CONTENT)
        download(s.url, to, len(CONTENT), MD5)
        assert s.asked == [] and to.read_bytes() == CONTENT
        to.unlink()
        part.write_bytes(CONTENT + b"more")
        download(s.url, to, len(CONTENT), MD5)
        assert s.asked == [None]
        to.unlink()
        s.content = CONTENT[:1000]
        part.write_bytes(CONTENT[:2000])                                         # 416, then from the beginning
        one_line(lambda: download(s.url, to, len(CONTENT), MD5), "broke off after 1,000 of 300,000 bytes")
        assert s.asked == [None, "bytes=2000-", None]


@pytest.mark.parametrize("content, expected", [(CONTENT[:-1] + b"?", "not the expected " + MD5), (CONTENT + b"more", "sent more than the expected 300,000 bytes")])
def test_a_download_of_another_file_is_removed(tmp_path, content, expected):
    with Server(content) as s:
        one_line(lambda: download(s.url, tmp_path / "file.bin", len(CONTENT), MD5), s.url, expected, "was removed")
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_file_is_noticed_and_removed(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(bytes(100_000))
    with Server() as s:
        one_line(lambda: download(s.url, tmp_path / "file.bin", len(CONTENT), MD5), "not the expected")
        assert not list(tmp_path.iterdir())
        download(s.url, tmp_path / "file.bin", len(CONTENT), MD5)


def test_a_server_that_is_not_there_and_a_folder_that_cannot_be_made(tmp_path):
    with Server() as s:
        url = s.url
    message = one_line(lambda: download(url, tmp_path / "file.bin", 10, MD5), f"the download of {url} to {tmp_path / 'file.bin'} failed after 0 of 10 bytes", "try again")
    assert "goes on" not in message
    (tmp_path / "file").write_text("")
    one_line(lambda: download(url, tmp_path / "file" / "x" / "file.bin", 10, MD5), "failed after 0 of 10 bytes")


def test_fetching_tiny_imagenet_downloads_decodes_and_loads(tmp_path, monkeypatch):
    content = tiny(tmp_path / "publisher").read_bytes()
    with Server(content) as s:
        monkeypatch.setattr(relkd.data, "TINY", {"url": s.url, "size": len(content), "md5": hashlib.md5(content).hexdigest()})
        data = fetch("tinyimagenet", tmp_path / "mine")
        assert data.counts == {"train": 6, "test": 4} and fetch("tinyimagenet", tmp_path / "mine").fingerprint == data.fingerprint and len(s.asked) == 1
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["tiny-imagenet-200.zip", "tinyimagenet"]


# --- few-shot sets

def few_shot(**more):
    images = torch.arange(6 * 3 * 2 * 2, dtype=torch.uint8).view(6, 3, 2, 2)
    return FewShot(**{"name": "f", "images": images, "labels": torch.tensor([0, 1, 2, 2, 1, 0]), "splits": {"train": (1,), "val": (0,), "test": (2,)}, "classes": ("a", "b", "c"), **more})


def test_few_shot_splits():
    f = few_shot()
    images, labels = f.split("train")
    assert labels.tolist() == [1, 1] and torch.equal(images, f.images[[1, 4]]) and f.counts == {"train": 2, "val": 2, "test": 2}
    assert torch.equal(f.mean_std[0].flatten(), (images.double().mean((0, 2, 3)) / 255).float())
    assert torch.equal(torch.stack(f.to("cpu").__dict__["mean_std"]), torch.stack(f.mean_std)) and f.normalise(images).mean().abs() < 1e-6
    assert len({f.fingerprint, few_shot(splits={"train": (0,), "val": (1,), "test": (2,)}).fingerprint, few_shot(labels=f.labels.flip(0) * 0).fingerprint}) == 3
    one_line(lambda: f.split("tset"), "unknown split of f 'tset': did you mean 'test'?")
    one_line(lambda: few_shot(splits={"train": (1, 2), "val": (0,), "test": (2,)}), "the splits of f share class 'c': a class belongs to one split")
    one_line(lambda: few_shot(splits={"train": (1,), "val": (), "test": (2,)}), "f has no class in split 'val'")


def test_the_published_splits_of_cifar100():
    parts = {n: {s: t.split() for s, t in HELD_OUT[n].items()} for n in HELD_OUT}
    assert [len(set(parts["cifar_fs"][s])) for s in ("val", "test")] == [16, 20] and set(sum(parts["cifar_fs"].values(), [])) <= set(CLASSES["cifar100"])
    assert [len(set(parts["fc100"][s])) for s in ("val", "test")] == [4, 4] and set(sum(parts["fc100"].values(), [])) <= set(SUPERCLASSES)
    assert all(set(p["val"]).isdisjoint(p["test"]) for p in parts.values())


ALPHABETS = {"images_background": ("Latin", "Gurmukhi"), "images_evaluation": ("Hebrew", "Tibetan")}


def omniglot_arrays(root):
    """Four alphabets, the last character of Gurmukhi being one of the four that Vinyals et al. test on; two drawings each."""
    rows = [(s, a, f"character{c:02}") for s, names in ALPHABETS.items() for a in names for c in ((1, 45) if a == "Gurmukhi" else (1, 2))]
    rng = np.random.default_rng(0)
    folder = root / "omniglot"
    folder.mkdir(parents=True)
    images = (rng.random((2 * len(rows), 105, 105)) < .1).astype(np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.repeat(np.arange(len(rows)), 2).astype(np.int16))
    (folder / "characters.csv").write_text("label,subset,alphabet,character\n" + "".join(f"{i},{','.join(r)}\n" for i, r in enumerate(rows)))
    return images, rows


def test_omniglot_is_shrunk_turned_and_split(tmp_path):
    images, rows = omniglot_arrays(tmp_path)
    f = load("omniglot", tmp_path)
    assert f.images.shape == (64, 1, 28, 28) and len(f.classes) == 32 and f.counts == {"train": 24, "val": 16, "test": 24}
    names = {s: {f.classes[i] for i in ids} for s, ids in f.splits.items()}
    assert "Gurmukhi/character01/rot000" in names["train"] and "Gurmukhi/character45/rot270" in names["test"] and "Hebrew/character02/rot090" in names["val"]
    for i in (0, 7, 15):
        for k in range(4):
            want = area_resize(torch.from_numpy(np.rot90(images[i], k).copy())[None, None] * 255, 28)[0]
            assert (f.images[i + 16 * k].int() - want.int()).abs().max() <= 1 and f.classes[f.labels[i + 16 * k]] == f"{rows[i // 2][1]}/{rows[i // 2][2]}/rot{90 * k:03}"


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
    assert key(got) == key(want) and np.load(root / "omniglot" / "images.npy").max() == 1                # labels follow the sorted alphabets
    shutil.rmtree(root / "omniglot-py")
    assert load("omniglot", root).fingerprint == got.fingerprint


@pytest.mark.parametrize("spoil, expected", [
    (lambda f: (f / "characters.csv").write_text("label,alphabet\n0,Latin\n"), "characters.csv must have rows with the columns label, alphabet, character"),
    (lambda f: (f / "characters.csv").write_text("label,alphabet,character\n0,Latin,c\n0,Latin,d\n"), "one row for each label from 0 to 1; got 0, 0 ..."),
    (lambda f: (f / "characters.csv").write_text("label,alphabet,character\n0,Latin,c\n"), "labels from 0 to 0; got 0 to 7"),
    (lambda f: (f / "characters.csv").write_bytes(b"\xff\xfe"), "characters.csv cannot be read"),
    (lambda f: np.save(f / "labels.npy", np.zeros(3, int)), "must hold 16 integer labels"),
    (lambda f: (f / "characters.csv").write_text((f / "characters.csv").read_text().replace("Hebrew", "Klingon")), "omniglot has no class in split 'val'"),
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
    assert np.abs(f.images[1].permute(1, 2, 0).numpy().astype(int) - decoded(jpeg(1, size=84))).max() <= 2
    resized = np.asarray(Image.open(io.BytesIO(jpeg(0, size=120))).resize((84, 84), Image.BILINEAR))
    assert np.abs(f.images[0].permute(1, 2, 0).numpy().astype(int) - resized).max() <= 3
    shutil.rmtree(folder / "images")
    assert load("miniimagenet", tmp_path).fingerprint == f.fingerprint


@pytest.mark.parametrize("spoil, expected", [
    (lambda f: (f / "val.csv").unlink(), "(miniimagenet/arrays/images.npy"),
    (lambda f: (f / "val.csv").write_text("file,label\na,b\n"), "val.csv must have rows with the columns filename, label"),
    (lambda f: (f / "val.csv").write_text("filename,label\n../train.csv,b\n"), "val.csv must name files inside images/; got '../train.csv'"),
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


# --- inventory

def test_the_inventory_reads_again_only_what_changed(tmp_path, monkeypatch):
    arrays(tmp_path / "own")
    omniglot_arrays(tmp_path)
    first = inventory(tmp_path)
    by_name = {e["name"]: e for e in first}
    assert [*by_name] == ["digits", "omniglot", "own"] and by_name["own"]["fingerprint"] == load("own", tmp_path).fingerprint
    assert by_name["own"] == {"name": "own", "kind": "Dataset", "counts": {"train": 6, "test": 4}, "shape": [3, 5, 7], "classes": 2, "fingerprint": by_name["own"]["fingerprint"]}
    assert by_name["omniglot"]["kind"] == "FewShot" and by_name["digits"]["fingerprint"] == digits().fingerprint
    read = []
    monkeypatch.setattr(relkd.data, "load", lambda name, root=None: read.append(name) or load(name, root))
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


def test_the_inventory_of_a_folder_that_is_not_there(tmp_path):
    assert [e["name"] for e in inventory(tmp_path / "none")] == ["digits"] and not list(tmp_path.iterdir())


# --- statistics, resizing, augmentation

def test_statistics_are_those_of_numpy_and_those_before():
    d = digits()
    x = d.train_images.double().div(255)
    assert torch.equal(d.mean_std[0], x.mean((0, 2, 3)).float()[:, None, None]) and torch.equal(d.mean_std[1], x.std((0, 2, 3)).float()[:, None, None])
    assert d.fingerprint == "6b8e28bb30671cd63590ffe76576455f6fe5e0c6d77bb3392a890c507e3b5547"
    assert d.to("cpu").fingerprint == d.fingerprint and torch.equal(torch.stack(d.to("cpu").__dict__["mean_std"]), torch.stack(d.mean_std))
    big = Dataset("b", torch.randint(0, 256, (3000, 3, 40, 40), dtype=torch.uint8, generator=generator()), torch.zeros(3000).long(), d.test_images, d.test_labels, ("0",))
    x = big.train_images.numpy() / 255
    np.testing.assert_allclose(torch.stack(big.mean_std)[:, :, 0, 0].numpy(), [x.mean((0, 2, 3)), x.std((0, 2, 3), ddof=1)], rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6))
def test_area_resize_equals_block_means_of_the_enlarged_image(h, w, size, seed):
    size = min(size, h, w)
    x = torch.rand(2, 3, h, w, generator=generator(seed)).double()
    big = x.repeat_interleave(size, 2).repeat_interleave(size, 3)                # every old pixel becomes size x size
    want = big.view(2, 3, size, h, size, w).mean((3, 5))
    torch.testing.assert_close(area_resize(x, size), want, atol=1e-5, rtol=1e-5)


def test_area_resize_of_bytes_and_beyond():
    x = torch.randint(0, 256, (2, 1, 105, 105), dtype=torch.uint8, generator=generator())
    assert area_resize(x, 28).dtype == torch.uint8 and torch.equal(area_resize(x, 105), x)
    assert (area_resize(x, 35).float() - torch.nn.functional.avg_pool2d(x.float(), 3)).abs().max() <= .51
    one_line(lambda: area_resize(x, 106), "area_resize shrinks: size must be from 1 to 105; got 106")


def rotate_loop(images, degrees, g):
    angles = (2 * torch.rand(len(images), generator=g) - 1) * degrees
    return torch.stack([TF.rotate(x, a.item(), TF.InterpolationMode.BILINEAR) for x, a in zip(images, angles)])


def jitter_loop(images, amounts, g):
    """torchvision on floats in 0..1, one image at a time, with the factors that colour_jitter draws."""
    low = torch.tensor([max(0., 1 - a) for a in amounts])
    factors = low + torch.rand(3, len(images), generator=g).T * (1 + torch.tensor(amounts) - low)
    return torch.stack([255 * TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x / 255, b.item()), c.item()), s.item()) for x, (b, c, s) in zip(images, factors)])


def bytes_of(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (5, 1, 28, 28), (4, 3, 20, 33), (3, 3, 31, 16)])
@pytest.mark.parametrize("degrees", [0, 15, 180])
def test_rotate_equals_torchvisions_image_by_image(shape, degrees):
    x = bytes_of(shape)
    torch.testing.assert_close(rotate(x.float(), degrees, generator(3)), rotate_loop(x.float(), degrees, generator(3)), atol=.05, rtol=0)
    got, want = rotate(x, degrees, generator(3)), rotate_loop(x, degrees, generator(3))
    assert got.dtype == torch.uint8 and (got.int() - want.int()).abs().max() <= 1
    assert degrees or torch.equal(got, x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("amounts", [(.4, .4, .4), (0., 0., 0.), (1.5, .2, .9), (0., 1., 2.)])
def test_colour_jitter_equals_torchvisions_image_by_image(channels, amounts):
    x = bytes_of((9, channels, 12, 10))
    want = jitter_loop(x.float(), amounts, generator(4))
    torch.testing.assert_close(colour_jitter(x.float(), *amounts, generator(4)), want, atol=.01, rtol=0)
    got = colour_jitter(x, *amounts, generator(4))
    assert got.dtype == torch.uint8 and (got.float() - want).abs().max() <= .51 and (any(amounts) or torch.equal(got, x))


def test_colour_jitter_needs_colours():
    one_line(lambda: colour_jitter(torch.zeros(2, 4, 5, 5), .1, .1, .1, generator()), "colour_jitter needs images of 1 or 3 channels; got (2, 4, 5, 5)")


@pytest.mark.parametrize("f, options", [(rotate, {"degrees": 30}), (colour_jitter, {"brightness": .5, "contrast": .5, "saturation": .5})])
def test_each_image_draws_its_own_and_keeps_its_type(f, options):
    x = bytes_of((1, 3, 16, 16)).expand(6, -1, -1, -1)
    for kind in (torch.uint8, torch.float32, torch.float64):
        y = f(x.to(kind), generator=generator(), **options)
        assert y.dtype == kind and y.shape == x.shape and len(y.flatten(1).unique(dim=0)) == 6 and y.min() >= 0 and y.max() <= 255
        assert torch.equal(y, f(x.to(kind), generator=generator(), **options))


def test_epochs_with_the_new_augmentations_depend_on_seed_and_number_alone():
    images = bytes_of((40, 3, 12, 12))
    data = Dataset("d", images, torch.arange(40) % 4, images[:4], torch.arange(4), tuple("abcd"))
    augment = ((rotate, {"degrees": 20}), (colour_jitter, {"brightness": .3, "contrast": .3, "saturation": .3}))

    def epoch(seed, number):
        torch.rand(3)                                                            # the global generator plays no part
        return torch.cat([x for _, x, _ in Batches(data, 16, seed, augment=augment).epoch(number)])

    assert torch.equal(epoch(1, 5), epoch(1, 5)) and not torch.equal(epoch(1, 5), epoch(1, 6)) and not torch.equal(epoch(1, 5), epoch(2, 5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_augmentations_run_where_the_images_are():
    x = bytes_of((4, 3, 16, 16)).cuda()
    g = torch.Generator("cuda").manual_seed(0)
    assert rotate(x, 30, g).is_cuda and colour_jitter(x, .4, .4, .4, g).is_cuda
    assert torch.equal(area_resize(x, 7).cpu(), area_resize(x.cpu(), 7))


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
