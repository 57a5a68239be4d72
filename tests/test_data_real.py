"""The forms that circulate, made from the real files where they are there, give the publisher's fingerprint (`make test-all`)."""
import hashlib
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from data_helpers import REAL
from PIL import Image
from test_data_forms import SHAPES, as_tree, as_zip, entries_of, in_class_folders

from relkd.data import CLASSES, load

TINY, TOP = REAL / "tiny-imagenet-200.zip", "tiny-imagenet-200/"


@pytest.fixture(autouse=True)
def slow(flags):
    if "slow" not in flags.split():
        pytest.skip("make test-all runs it")


def there(name):
    try:
        return load(name, REAL)
    except ValueError as error:
        pytest.skip(str(error))


def png(a):
    out = io.BytesIO()
    Image.fromarray(a).save(out, "PNG", compress_level=1)
    return out.getvalue()


# --- Tiny ImageNet: a few of its classes in every shape, all of them in the one that most people have

@pytest.fixture(scope="module")
def few_classes():
    """The real entries of ten classes, with lists that name no others."""
    if not TINY.exists():
        pytest.skip("Tiny ImageNet is not here")
    entries = entries_of(TINY)
    ids = sorted(entries[f"{TOP}wnids.txt"].decode().split())[::20]
    rows = [r for r in entries[f"{TOP}val/val_annotations.txt"].decode().splitlines() if r.split("\t")[1] in ids]
    kept = {f"{TOP}val/images/{r.split(chr(9))[0]}" for r in rows}
    few = {n: c for n, c in entries.items() if n in kept or n == f"{TOP}words.txt" or n.split("/")[1:3] in [["train", w] for w in ids]}
    return few | {f"{TOP}wnids.txt": "\n".join(ids).encode(), f"{TOP}val/val_annotations.txt": "\n".join(rows).encode()}


@pytest.mark.parametrize("shape", SHAPES)
def test_real_tiny_imagenet_in_any_shape(tmp_path_factory, few_classes, shape):
    published = tmp_path_factory.getbasetemp() / "published tiny"
    if not published.exists():
        published.mkdir()
        as_zip(published, few_classes)
    want, root = load("tinyimagenet", published), tmp_path_factory.mktemp("other")
    assert want.counts == {"train": 5000, "test": 500}
    SHAPES[shape](root, few_classes)
    assert load("tinyimagenet", root).fingerprint == want.fingerprint


def test_all_of_tiny_imagenet_unpacked_with_val_in_folders(tmp_path):
    want = there("tinyimagenet")
    if not TINY.exists():
        pytest.skip("Tiny ImageNet's zip is not here")
    as_tree(tmp_path, in_class_folders(entries_of(TINY)))
    assert load("tinyimagenet", tmp_path).fingerprint == want.fingerprint


# --- CIFAR-100

def cifar_rows(data):
    return {s: (data.split(s)[0].reshape(-1, 3072).numpy(), data.split(s)[1].numpy()) for s in ("train", "test")}


def test_real_cifar100_in_the_binary_version_and_in_torchvisions(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    data = there("cifar100")
    for root, folder in (("a", "cifar-100-binary"), ("b", "cifar-100-python"), ("c", "data/CIFAR-100-python")):
        (tmp_path / root / folder).mkdir(parents=True)
    md5 = {}
    for s, (pixels, labels) in cifar_rows(data).items():
        rows = np.concatenate([np.zeros((len(labels), 1), np.uint8), labels[:, None].astype(np.uint8), pixels], 1)
        (tmp_path / "a" / "cifar-100-binary" / f"{s}.bin").write_bytes(rows.tobytes())
        md5[s] = pickle.dumps({"data": pixels, "fine_labels": labels.tolist()}, 2)
    md5["meta"] = pickle.dumps({"fine_label_names": list(CLASSES["cifar100"])}, 2)
    for folder in ("b/cifar-100-python", "c/data/CIFAR-100-python"):
        for s, content in md5.items():
            (tmp_path / folder / s).write_bytes(content)
    told = {s: hashlib.md5(content).hexdigest() for s, content in md5.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", told["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", told["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": told["meta"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert {load("cifar100", tmp_path / r).fingerprint for r in "abc"} == {data.fingerprint}


@pytest.mark.parametrize("name", ["cifar_fs", "fc100"])
def test_real_few_shot_sets_as_folders_and_as_pickles_are_one_set_with_cifars_images(tmp_path, name):
    data = there(name)
    images = data.images.permute(0, 2, 3, 1).numpy()
    for split, classes in data.splits.items():
        of_class = {data.classes[c]: images[(data.labels == c).numpy()] for c in sorted(classes, key=lambda c: data.classes[c])}
        as_tree(tmp_path / "a" / name / split, {f"{c}/{i:04}.png": png(x) for c, part in of_class.items() for i, x in enumerate(part)})
        d = {"data": np.concatenate([*of_class.values()]), "labels": [k for k, part in enumerate(of_class.values()) for _ in part]}
        as_tree(tmp_path / "b", {f"{name.upper()}_{split}.pickle": pickle.dumps(d, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)            # all 60,000 images, and the published split
        a, b = (load(name, tmp_path / r) for r in "ab")
    assert a.fingerprint == b.fingerprint and a.counts == data.counts
    for k in (0, 63, 99):
        theirs = data.images[data.labels == data.classes.index(a.classes[k])]
        assert torch.equal(a.images[a.labels == k], theirs)


# --- Omniglot

def test_real_omniglot_in_zips_in_a_clone_and_unpacked(tmp_path):
    want = there("omniglot")
    folder = REAL / "omniglot"
    drawings, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    rows = [r.split(",") for r in (folder / "characters.csv").read_text().splitlines()[1:]]
    named = {int(label): f"{subset}/{alphabet}/{character}" for label, subset, alphabet, character in rows}
    entries, count = {}, {}
    for ink, y in zip(drawings, labels.tolist()):
        count[y] = count.get(y, 0) + 1
        out = io.BytesIO()
        Image.fromarray((1 - ink) * 255).convert("1").save(out, "PNG")
        entries[f"{named[y]}/{y:04}_{count[y]:02}.png"] = out.getvalue()
    for root in ("a/omniglot-py", "b/omniglot/python"):
        (tmp_path / root).mkdir(parents=True)
        for subset in ("images_background", "images_evaluation"):
            as_zip(tmp_path / root, {n: c for n, c in entries.items() if n.startswith(subset)}, f"{subset}.zip")
    as_tree(tmp_path / "c" / "omniglot", {n.split("/", 1)[1]: c for n, c in entries.items()})
    assert {load("omniglot", tmp_path / r).fingerprint for r in "abc"} == {want.fingerprint}
