"""Data for retrieval: splits by class of sets that are here, photographs in their publishers' layouts, decoded once and mapped."""
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms.functional import crop

from data_helpers import REAL, arrays, omniglot_arrays, one_line, tiny
from helpers import gen
from relkd.data import (CLASSES, Batches, ClassBalanced, Dataset, Source, centre_crop, check_name, class_groups, decoded, digits, fetch,
                        flip, halves, inventory, load, map_images, photos, random_crop)
from relkd.data import mapped
from relkd.data.omniglot import EVALUATION


# --- splits of sets that are here

def test_halves_pool_what_was_held_apart():
    d = digits()
    h = halves(d)
    assert (h.by_class and h.splits == {"train": (0, 1, 2, 3, 4), "test": (5, 6, 7, 8, 9)}
            and sum(h.counts.values()) == 1797 and h.images.data_ptr() == d.images.data_ptr())
    odd = Dataset("o", torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5),
                  {"train": range(0, 3), "test": range(3, 5)}, tuple("abcde"))
    assert halves(odd).splits == {"train": (0, 1), "test": (2, 3, 4)} and halves(odd).fingerprint != odd.fingerprint


def test_a_split_is_an_option(tmp_path):
    arrays(tmp_path / "cifar100", n=(200, 100), shape=(32, 32, 3), classes=100)
    data, plain = load("cifar100", tmp_path, split="retrieval"), load("cifar100", tmp_path)
    assert (data.counts == {"train": 150, "test": 150} and data.splits["test"] == tuple(range(50, 100))
            and data.classes == CLASSES["cifar100"])
    assert (data.name == "cifar100" and not plain.by_class
            and len({data.fingerprint, plain.fingerprint, load("cifar_fs", tmp_path).fingerprint}) == 3)
    check_name("cifar100", tmp_path, split="retrieval")
    one_line(lambda: check_name("cifar100", tmp_path, split="retreival"),
             "unknown split of cifar100 'retreival': did you mean 'retrieval'?")
    one_line(lambda: load("cifar100", tmp_path, split=None), "unknown split of cifar100 'None': known are retrieval")
    one_line(lambda: load("cifar100", tmp_path, size=3), "data set 'cifar100' has no option 'size': it has split")
    one_line(lambda: load("cifar_fs", tmp_path, split="retrieval"), "data set 'cifar_fs' has no option 'split': it has none")


def test_tiny_imagenet_and_omniglot_in_miniature(tmp_path):
    tiny(tmp_path)
    data = load("tinyimagenet", tmp_path, split="retrieval")
    assert data.counts == {"train": 5, "test": 5} and data.splits == {"train": (0,), "test": (1,)}
    images, rows = omniglot_arrays(tmp_path)
    data = load("omniglot", tmp_path, split="retrieval", resize="nearest")
    assert (data.classes == tuple(f"{a}/{c}" for _, a, c in rows) and len(data.images) == len(images)
            and data.splits == {"train": (0, 1, 4, 5), "test": (2, 3, 6, 7)})
    assert torch.equal(data.images, load("omniglot", tmp_path, resize="nearest").images[:len(images)])
    groups, names = class_groups(data)
    assert names == ("Latin", "Gurmukhi", "Hebrew", "Tibetan") and groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert class_groups(digits())[0].tolist() == [0] * 10 and class_groups(digits())[1] == ("",)


@pytest.mark.skipif(not (REAL / "cifar100").is_dir(), reason="CIFAR-100 is not here")
def test_the_real_cifar100():
    data = load("cifar100", REAL, split="retrieval")
    assert data.counts == {"train": 30_000, "test": 30_000} and (data.classes[0], data.classes[49], data.classes[50],
                                                                 data.classes[99]) == ("apple", "mountain", "mouse", "worm")
    x, y = data.split("test")
    assert y.unique().tolist() == list(range(50, 100)) and (y.bincount()[50:] == 600).all() and x.shape == (30_000, 3, 32, 32)
    labels = np.load(REAL / "cifar100" / "test_labels.npy")
    last = np.load(REAL / "cifar100" / "test_images.npy", mmap_mode="r")[np.flatnonzero(labels >= 50)[-1]]
    assert np.array_equal(x[-1].permute(1, 2, 0).numpy(), last), "the publisher's test images stand last"


@pytest.mark.skipif(not (REAL / "omniglot").is_dir(), reason="Omniglot is not here")
def test_the_real_omniglot():
    data = load("omniglot", REAL, split="retrieval")
    rows = [line.split(",")[1:] for line in (REAL / "omniglot" / "characters.csv").read_text().splitlines()[1:]]
    assert data.counts == {"train": 19_280, "test": 13_180} and data.classes == tuple(f"{a}/{c}" for _, a, c in rows)
    assert (set(EVALUATION.split()) == {a for s, a, _ in rows if s == "images_evaluation"}
            and {rows[c][0] for c in data.splits["train"]} == {"images_background"})
    assert (data.labels.bincount() == 20).all() and data.images.shape[1:] == (1, 28, 28)
    groups, names = class_groups(data)
    assert len(names) == 50 and not set(groups[list(data.splits["train"])].tolist()) & set(groups[list(data.splits["test"])].tolist())


# --- windows

def test_random_windows_are_torchvisions_one_by_one():
    x = torch.randint(0, 256, (6, 3, 11, 9), dtype=torch.uint8, generator=gen())
    got = random_crop(x, 7, gen(3))
    g = gen(3)
    top, left = (torch.randint(0, n - 7 + 1, (6,), generator=g).tolist() for n in (11, 9))
    assert got.is_contiguous() and torch.equal(got, torch.stack([crop(i, t, k, 7, 7) for i, t, k in zip(x, top, left)]))
    assert torch.equal(random_crop(x, 7, gen(3)), got) and not torch.equal(random_crop(x, 7, gen(4)), got)
    assert torch.equal(random_crop(x[:, :, :9], 9, gen()), x[:, :, :9]) and random_crop(x.float(), 2, gen()).dtype == torch.float32
    places = torch.stack([random_crop(torch.arange(16.).view(1, 1, 4, 4), 2, gen(k)).view(-1)[0] for k in range(300)])
    assert sorted(places.unique().tolist()) == [0, 1, 2, 4, 5, 6, 8, 9, 10], "every place is drawn"


@pytest.mark.parametrize("side, size", [(256, 224), (9, 4), (9, 7), (11, 4), (11, 8), (8, 8)])
def test_the_central_window_is_torchvisions(side, size):
    x = torch.randint(0, 256, (2, 3, side, side + 3), dtype=torch.uint8, generator=gen())
    assert (torch.equal(centre_crop(x, size), CenterCrop(size)(x)) and centre_crop(x, size).untyped_storage().data_ptr()
            == x.untyped_storage().data_ptr())


@pytest.mark.parametrize("size", [0, 10, 3.0, None, (3, 3)])
def test_windows_that_do_not_fit(size):
    x = torch.zeros(2, 1, 12, 9)
    for call in (lambda: random_crop(x, size, gen()), lambda: centre_crop(x, size)):
        one_line(call, f"a crop of (12, 9) pixels must have a size from 1 to 9; got {size!r}")


# --- decoded once, mapped

def picture(path, k=0, size=None, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(k)
    small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    small.resize(size or (40 + 7 * k, 90 - 5 * k), Image.Resampling.BICUBIC).convert(mode).save(path, **options)


def several(folder):
    names = {"a/wide.jpg": "RGB", "a/grey.JPG": "L", "b/cmyk.jpg": "CMYK", "b/palette.png": "P", "鸟 é.jpg": "RGB", "alpha.png": "RGBA"}
    for k, (name, mode) in enumerate(names.items()):
        picture(folder / name, k, mode=mode)
    return [*names]


def kept(folder):
    return sorted(folder.glob("decoded-*"))


def test_images_are_torchvisions_whatever_their_mode_and_the_number_of_workers(tmp_path):
    names = several(tmp_path)
    want = [np.asarray(Resize((256, 256))(Image.open(tmp_path / n).convert("RGB"))).transpose(2, 0, 1) for n in names]
    for workers in (1, 2, 7, None):
        images = decoded(tmp_path, names, num_workers=workers)
        assert images.shape == (6, 3, 256, 256) and images.dtype == torch.uint8 and np.array_equal(images.numpy(), want)
        assert images.is_contiguous()
        kept(tmp_path)[0].unlink()
    many = [names[k % 6] for k in range(83)]                                    # more than are under way at once
    assert torch.equal(decoded(tmp_path, many, 32, 2), decoded(tmp_path, names, 32, 1)[torch.arange(83) % 6])


def test_the_file_is_used_again_and_made_again_when_an_image_changed(tmp_path, monkeypatch):
    names = several(tmp_path)
    first = decoded(tmp_path, names, 32).clone()
    path, = kept(tmp_path)
    assert np.array_equal(np.load(path), first.numpy()), "numpy reads it too"
    with monkeypatch.context() as m:
        m.setattr(mapped, "read_pixels", lambda *a: pytest.fail("decoded again"))
        again = decoded(tmp_path, names, 32)
    assert torch.equal(again, first)
    again.zero_()                                                                # a private copy: the file keeps its bytes
    assert np.array_equal(np.load(path), first.numpy())
    (tmp_path / f"{path.stem}.old.tmp").write_bytes(b"cut off")
    (tmp_path / f"{path.stem}.new.tmp").write_bytes(b"another process's")
    os.utime(tmp_path / f"{path.stem}.old.tmp", (0, 0))
    picture(tmp_path / names[0], 9)
    second = decoded(tmp_path, names, 32)
    assert (not torch.equal(second[0], first[0]) and torch.equal(second[1:], first[1:])
            and torch.equal(again[1:], torch.zeros_like(first[1:])))
    assert [p.suffix for p in kept(tmp_path)] == [".npy", ".tmp"] or [p.suffix for p in kept(tmp_path)] == [".tmp", ".npy"]
    assert not path.exists() and not list(tmp_path.glob("*.old.tmp"))
    os.utime(tmp_path / names[1], ns=(1, 1))                                     # the same bytes, another time: it cannot be known
    assert torch.equal(decoded(tmp_path, names, 32), second) and torch.equal(decoded(tmp_path, names[::-1], 32), second.flip(0))
    decoded(tmp_path, names, 16)
    assert len(list(tmp_path.glob("decoded-32-*.npy"))) == len(list(tmp_path.glob("decoded-16-*.npy"))) == 1


def test_all_that_cannot_be_read_are_named_in_one_pass(tmp_path):
    names = several(tmp_path)
    bad = [f"{k}.jpg" for k in range(7)]
    for name in bad:
        (tmp_path / name).write_bytes(b"no image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "half.jpg").write_bytes((tmp_path / names[0]).read_bytes()[:500])
    said = one_line(lambda: decoded(tmp_path, [names[0], *bad, names[1]], 32, 2),
                    f"{tmp_path}: 7 of 9 images cannot be read: 0.jpg (UnidentifiedImageError), ",
                    "4.jpg (UnidentifiedImageError), ...: get them again")
    assert "5.jpg" not in said and not kept(tmp_path)
    one_line(lambda: decoded(tmp_path, ["deep.png", "half.jpg", *names], 32, 1),
             "2 of 8 images cannot be read: deep.png (more than 8 bits a channel), half.jpg (OSError): get them again")
    one_line(lambda: decoded(tmp_path, [*names, "not/here.jpg", "鸟.jpg"], 32),
             "2 of 8 images are missing: not/here.jpg, 鸟.jpg: get the set again")
    assert not kept(tmp_path)


def test_what_stops_the_decoding(tmp_path, monkeypatch):
    names = several(tmp_path)
    for options, expected in (({"size": 0}, "size must be at least 1; got 0"),
                              ({"num_workers": 0}, "num_workers must be at least 1; got 0"),
                              ({"num_workers": 2.}, "got 2.0")):
        one_line(lambda: decoded(tmp_path, names, **options), expected)
    with monkeypatch.context() as m:
        m.setattr(mapped.shutil, "disk_usage", lambda folder: type("u", (), {"free": 10**6}))
        one_line(lambda: decoded(tmp_path, names), f"cannot write decoded images into {tmp_path} (0.0 GB needed, 0.0 GB free): make room")
    with monkeypatch.context() as m:
        m.setattr(mapped.os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        one_line(lambda: decoded(tmp_path, names, 32), "(No space left on device): make room")
    with monkeypatch.context() as m:
        m.setattr(mapped, "read_pixels", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            decoded(tmp_path, names, 32)
    assert not kept(tmp_path)
    decoded(tmp_path, names, 32)
    path, = kept(tmp_path)
    for content in (path.read_bytes()[:-1], b"", b"x" * 200, path.read_bytes() + b"x"):
        path.write_bytes(content)
        one_line(lambda: decoded(tmp_path, names, 32), f"{path} is not a whole file of decoded images: remove it, and it is made again")
    np.save(path, np.zeros((6, 3, 32, 32)))
    one_line(lambda: map_images(path), "is not a whole file")


# --- the publishers' layouts

@pytest.fixture(autouse=True)
def small_copies(request):
    "The line about counts is asked for where it matters."
    with warnings.catch_warnings():
        if "counts" not in request.node.name:
            warnings.filterwarnings("ignore", message=".* for training and retrieval, the publisher's")
        yield


def cub(root, classes=(1, 100, 101, 200), n=2):
    folder = root / "CUB_200_2011"
    files = [f"{c:03}.Bird_{c}/Bird_{i}.jpg" for c in classes for i in range(n)]
    for k, f in enumerate(files):
        picture(folder / "images" / f, k, mode="L" if k == 1 else "RGB")
    ids = {f: k for k, f in enumerate(files, 1)}
    (folder / "images.txt").write_text("".join(f"{ids[f]} {f}\n" for f in files))
    (folder / "image_class_labels.txt").write_text("".join(f"{ids[f]} {int(f[:3])}\n" for f in files))
    return folder


def sop(root, train=2, test=2, n=3, size=None):
    folder, k = root / "Stanford_Online_Products", 0
    for split, classes in (("train", range(1, train + 1)), ("test", range(train + 1, train + test + 1))):
        lines = ["image_id class_id super_class_id path"]
        for c in classes:
            for i in range(n):
                k, kind = k + 1, ("bicycle", "coffee_maker")[c % 2]
                lines.append(f"{k} {c} {1 + c % 2} {kind}_final/{11 * c}_{i}.JPG")
                picture(folder / lines[-1].split()[-1], k % 9, size)
        (folder / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


NAMES = np.array([f"Make C/V {c}" for c in range(1, 197)], dtype=object)
CARS = [(98, "a.jpg"), (1, "b.jpg"), (99, "c.jpg"), (196, "d.jpg"), (1, "e.jpg")]


def records(**columns):
    rows = np.empty((1, len(columns["class"])), dtype=[(name, object) for name in columns])
    for name, values in columns.items():
        for k, v in zip(range(rows.size), values):
            rows[name][0, k] = v
    return rows


def cars(root, layout):
    folder = root / ("stanford_cars" if layout == "devkit" else "cars196")
    for k, (c, f) in enumerate(CARS):
        part = ("train", "test")[k % 2]
        picture(folder / {"one": f"car_ims/{f}", "devkit": f"cars_{part}/{f}", "folders": f"{part}/Make {c:03}/{f}"}[layout], k)
    if layout == "one":
        savemat(folder / "cars_annos.mat",
                {"annotations": records(relative_im_path=[f"car_ims/{f}" for _, f in CARS], bbox_x1=[1] * 5,
                                        **{"class": [np.uint8(c) for c, _ in CARS], "test": [0] * 5}), "class_names": NAMES})
    if layout == "devkit":
        (folder / "devkit").mkdir()
        savemat(folder / "devkit" / "cars_meta.mat", {"class_names": NAMES})
        for k, path in enumerate(("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")):
            savemat(folder / path, {"annotations": records(fname=[f for _, f in CARS[k::2]], bbox_x1=[1] * 5,
                                                           **{"class": [np.uint8(c) for c, _ in CARS[k::2]]})})
    return folder


def test_cub(tmp_path):
    folder = cub(tmp_path)
    data = load("cub200", tmp_path)
    assert (data.by_class and data.counts == {"train": 4, "test": 4} and data.splits == {"train": (0, 1), "test": (2, 3)}
            and data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3])
    assert data.classes == ("001.Bird_1", "100.Bird_100", "101.Bird_101", "200.Bird_200") and not data.on_host
    for k, image in enumerate(data.images):
        file = folder / "images" / (folder / "images.txt").read_text().splitlines()[k].split()[1]
        assert np.array_equal(image.numpy(), np.asarray(Image.open(file).convert("RGB").resize(
            (256, 256), Image.Resampling.BILINEAR)).transpose(2, 0, 1))
    assert (torch.equal(data.mean_std[0].flatten(), torch.tensor([.485, .456, .406]))
            and torch.equal(data.mean_std[1].flatten(), torch.tensor([.229, .224, .225])))
    lines = (folder / "images.txt").read_text().splitlines()
    (folder / "images.txt").write_text("\n".join(lines[::-1]))                   # another order: the split is a run of places all the same
    other = load("cub200", tmp_path)
    assert (other.labels.tolist() == data.labels.tolist() and torch.equal(other.images[:2], data.images[:2].flip(0))
            and other.fingerprint != data.fingerprint)
    assert load("cub200", tmp_path, size=32, num_workers=1).images.shape == (8, 3, 32, 32)
    assert {e["name"]: e["counts"] for e in inventory(tmp_path)}["cub200"] == {"train": 4, "test": 4}
    one_line(lambda: fetch("cub200", tmp_path / "none"), "cub200 cannot be downloaded; place the publisher's archive there, unpacked")


@pytest.mark.parametrize("layout", ["one", "devkit", "folders"])
def test_cars(tmp_path, layout):
    folder = cars(tmp_path, layout)
    data = load("cars196", tmp_path, size=32)
    names = (("Make 001", "Make 098", "Make 099", "Make 196") if layout == "folders"
             else ("Make C-V 1", "Make C-V 98", "Make C-V 99", "Make C-V 196"))
    assert data.classes == names and data.counts == {"train": 3, "test": 2} and data.splits == {"train": (0, 1), "test": (2, 3)}
    of = {f: next(p for p in folder.rglob(f)) for _, f in CARS}
    pixels = {f: np.asarray(Image.open(p).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
              for f, p in of.items()}
    for f, y in (("a.jpg", 1), ("b.jpg", 0), ("c.jpg", 2), ("d.jpg", 3), ("e.jpg", 0)):
        assert sum(np.array_equal(x.numpy(), pixels[f]) for x in data.images[data.labels == y]) == 1
    if layout == "devkit":
        from torchvision.datasets import StanfordCars

        theirs = {s: StanfordCars(tmp_path, split=s) for s in ("train", "test")}
        assert sorted(y + 1 for d in theirs.values() for _, y in d) == sorted(c for c, _ in CARS), "torchvision reads the same layout"


def test_products(tmp_path):
    sop(tmp_path)
    data = load("sop", tmp_path, size=32)
    assert data.counts == {"train": 6, "test": 6} and data.classes == ("coffee_maker/1", "bicycle/2", "coffee_maker/3", "bicycle/4")
    groups, names = class_groups(data)
    assert names == ("coffee_maker", "bicycle") and groups.tolist() == [0, 1, 0, 1] and not data.on_host
    assert load("sop", tmp_path, size=32, on_host=True).on_host


def test_counts_that_are_not_the_publishers_give_a_line(tmp_path, monkeypatch):
    cub(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load("cub200", tmp_path, size=16)
    assert [str(w.message) for w in told] == [f"{tmp_path / 'CUB_200_2011'} holds 4 classes, 4 and 4 images "
                                              "for training and retrieval, the publisher's 200 classes, 5864 and 5924 "
                                              "images: results are not those of the whole set"]
    monkeypatch.setitem(photos.DUE, "cub200", (4, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("cub200", tmp_path, size=16)


def rewrite(file, old, new):
    return lambda f: (f / file).write_text((f / file).read_text().replace(old, new))


@pytest.mark.parametrize("make, spoil, expected", [
    (cub, lambda f: (f / "images.txt").unlink(),
     ["looked for CUB_200_2011/{images,image_class_labels}.txt with images/ (CUB_200_2011/images.txt missing)",
      "place the publisher's archive there"]),
    (cub, lambda f: [f.rename(f.parent / "x"), f.mkdir(), (f / "README").touch()], ["(CUB_200_2011 holds README)"]),
    (cub, rewrite("images.txt", "3 100.", "three 100."), ["images.txt, line 3 must be 'image_id path'; "
                                                          "got 'three 100.Bird_100/Bird_0.jpg'"]),
    (cub, rewrite("image_class_labels.txt", "3 100", "3 1.5"), ["image_class_labels.txt, line 3 must be 'image_id class_id'; got '3 1.5'"]),
    (cub, rewrite("image_class_labels.txt", "3 100", ""), ["image 3 is in only one of images.txt and image_class_labels.txt"]),
    (cub, rewrite("images.txt", "001.Bird_1/Bird_0", "../../secret"), ["must name files inside it; got 'images/../../secret.jpg'"]),
    (cub, rewrite("images.txt", "001.Bird_1/Bird_0", "001.Bird_1/Bird_7"),
     ["1 of 8 images are missing: images/001.Bird_1/Bird_7.jpg: get the set again"]),
    (cub, lambda f: (f / "images.txt").write_bytes(b"1 \xff.jpg\n"), ["images.txt cannot be read (UnicodeDecodeError)"]),
    (lambda root: cub(root, (1, 2)), lambda f: None, ["holds no image of a class of split 'test'"]),
    (cub, lambda f: (f / "images" / "101.Bird_101" / "Bird_1.jpg").write_bytes(b""),
     ["1 of 8 images cannot be read: images/101.Bird_101/Bird_1.jpg (UnidentifiedImageError)"]),
    (sop, lambda f: (f / "Ebay_test.txt").unlink(), ["looked for Stanford_Online_Products/Ebay_{train,test}.txt with "
                                                     "*_final/ (Stanford_Online_Products/Ebay_test.txt missing)"]),
    (sop, rewrite("Ebay_test.txt", " 3 2 ", " 1 2 "), ["class 1 of", "is in both lists: a class belongs to one split"]),
    (sop, rewrite("Ebay_train.txt", "1 1 2 ", "1 1 "),
     ["Ebay_train.txt, line 2 must be 'image_id class_id super_class_id path'; got '1 1 coffee"]),
    (lambda root: cars(root, "one"), lambda f: (f / "cars_annos.mat").write_bytes(b"x" * 300),
     ["cars_annos.mat must be a .mat file that holds 'annotations' with relative_im_path, class"]),
    (lambda root: cars(root, "one"), lambda f: savemat(f / "cars_annos.mat", {"annotations": 3}),
     ["cars_annos.mat must be a .mat file that holds 'annotations'"]),
    (lambda root: cars(root, "one"), lambda f: (f / "cars_annos.mat").unlink(),
     ["looked for cars196/cars_annos.mat with car_ims/ and stanford_cars/ as torchvision has it and "
      "cars196/{train,test}/CLASS/*.jpg (cars196/cars_annos.mat missing); place one of these"]),
    (lambda root: cars(root, "devkit"), lambda f: savemat(f / "devkit" / "cars_meta.mat", {"class_names": NAMES[:98]}),
     ["has class 99; there are names for 1 to 98"]),
])
def test_copies_that_are_wrong(tmp_path, make, spoil, expected):
    folder = make(tmp_path)
    spoil(folder)
    name = {"CUB_200_2011": "cub200", "Stanford_Online_Products": "sop"}.get(folder.name, "cars196")
    one_line(lambda: load(name, tmp_path, size=16), *expected)


def test_a_shared_disk_that_is_not_written_to(tmp_path, monkeypatch):
    folder = cub(tmp_path / "shared")
    before = sorted(folder.iterdir())
    monkeypatch.setenv("RELKD_CACHE", str(tmp_path / "mine"))
    d = load("cub200", tmp_path / "shared", size=16)
    assert sorted(folder.iterdir()) == before and len(kept(tmp_path / "mine" / "CUB_200_2011")) == 1
    monkeypatch.delenv("RELKD_CACHE")
    assert load("cub200", tmp_path / "shared", size=16).fingerprint == d.fingerprint and len(kept(folder)) == 1


def test_names_with_blanks_and_of_other_scripts(tmp_path):
    folder = cub(tmp_path)
    old, new = "001.Bird_1/Bird_0.jpg", "001.Bird_1/信天翁 é 0.jpg"
    (folder / "images" / old).rename(folder / "images" / new)
    (folder / "images.txt").write_text((folder / "images.txt").read_text().replace(old, new), encoding="utf-8-sig")
    assert load("cub200", tmp_path, size=16).counts == {"train": 4, "test": 4}


# --- batches of what is mapped

def same_in_memory(data):
    return replace(data, images=data.images.clone())


def test_batches_of_mapped_images_are_those_of_images_in_memory(tmp_path):
    sop(tmp_path, 3, 2, 4)
    data = load("sop", tmp_path, size=20)
    memory, host = same_in_memory(data), load("sop", tmp_path, size=20, on_host=True)
    assert data.fingerprint == memory.fingerprint == host.fingerprint and data.images.data_ptr() == data.to("cpu").images.data_ptr()
    at = data.images.data_ptr()
    assert (data.split("train")[0].data_ptr() == data.train_images.data_ptr() == at
            and data.test_images.data_ptr() == at + 12 * 3 * 20 * 20), "views"
    augment = (random_crop, {"size": 16}), (flip, {})
    for make in (lambda d: Batches(d, 5, 0, augment=augment), lambda d: ClassBalanced(d, "train", 2, 3, 0),
                 lambda d: ClassBalanced(d, "test", 2, 4, 1)):
        steps = [list(make(d).epoch(2)) for d in (memory, data, host)]
        for a, b, c in zip(*steps, strict=True):
            assert all(torch.equal(u, v) and torch.equal(u, w) for u, v, w in zip(a, b, c, strict=True))
    x = centre_crop(data.test_images, 16)
    assert (torch.equal(data.normalise(x), (x.float() / 255 - data.mean_std[0]) / data.mean_std[1])
            and torch.equal(host.normalise(x), data.normalise(x)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_images_on_the_host_move_batch_by_batch(tmp_path):
    sop(tmp_path, 3, 2, 4)
    host, whole = (load("sop", tmp_path, size=20, on_host=h).to("cuda") for h in (True, False))
    assert not host.images.is_cuda and host.labels.is_cuda and whole.images.is_cuda and host.mean_std[0].is_cuda
    for a, b in zip(ClassBalanced(host, "train", 2, 3, 0).epoch(0), ClassBalanced(whole, "train", 2, 3, 0).epoch(0), strict=True):
        assert all(u.is_cuda and torch.equal(u, v) for u, v in zip(a, b, strict=True))
    assert torch.equal(host.normalise(host.test_images), whole.normalise(whole.test_images))


def test_labels_together_or_not_give_the_same_split():
    d = digits()
    order = d.labels.argsort(stable=True)
    apart, together = halves(d), halves(replace(d, images=d.images[order], labels=d.labels[order]))
    assert together.test_images.untyped_storage().data_ptr() == together.images.untyped_storage().data_ptr()
    for c in range(5, 10):
        assert torch.equal(apart.test_images[apart.test_labels == c], together.test_images[together.test_labels == c])
    assert torch.equal(together.test_labels, together.labels[together.labels >= 5]) and together.counts == apart.counts


MEMORY = """
import sys, threading, time
import torch
from relkd.data import ClassBalanced, load, random_crop

torch.set_num_threads(1)
most, done = [0], threading.Event()

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def watch():
    while not done.is_set():
        most[0] = max(most[0], own())
        time.sleep(.002)

before = own()
threading.Thread(target=watch, daemon=True).start()
data = load("sop", sys.argv[1], num_workers=2).to("cpu")
decoding, most[0] = most[0] - before, 0
stream = ClassBalanced(data, "train", 4, 2, 0, length=20)
seen = {int(i) for index, x, y in stream.epoch(0) for i in index}
data.fingerprint, data.split("test"), data.test_images[-1].float().mean()
done.set()
print(data.images.numel() / 2**20, decoding, max(most[0], own()) - before, len(seen))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc of Linux")
def test_a_set_of_products_is_never_whole_in_memory(tmp_path, relkd_env, flags):
    if "slow" not in flags:
        pytest.skip("a process of its own, whose memory is measured: --flags slow")
    folder = sop(tmp_path, 20, 20, 2, size=(60, 60))
    files = {split: (folder / f"Ebay_{split}.txt").read_text().splitlines() for split in ("train", "test")}
    for lines in files.values():                                                 # each image many times: 1,600 of 80 files
        lines[1:] = lines[1:] * 20
    for split, lines in files.items():
        (folder / f"Ebay_{split}.txt").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env=relkd_env)
    assert done.returncode == 0, done.stderr
    whole, decoding, reading, seen = map(float, done.stdout.split())
    assert whole == 1600 * 3 * 256 * 256 / 2**20 == 300 and seen > 100
    assert decoding < 100 and reading < 100, f"{decoding:.0f} MB while decoding and {reading:.0f} MB while reading, of {whole:.0f}"


def test_a_source_may_have_options_and_splits():
    one = Source("one", (("x", (), lambda root, name, size=1: [size, size]),), "make it", options=("size",),
                 splits={"half": lambda d: d[:1]})
    assert one(".", size=3, split="half") == [3] and one(".", split="half") == [1] and one(".") == [1, 1]
    one_line(lambda: one.find(".", split="quarter"), "unknown split of one 'quarter': known are half")
    one_line(lambda: one.find(".", depth=3), "data set 'one' has no option 'depth': it has size, split")
