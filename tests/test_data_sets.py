"""The one container: its splits, its statistics, its fingerprint, and what it refuses."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_helpers import one_line
from helpers import gen
from relkd.data import Dataset, digits, joined, load


def test_statistics_are_those_of_numpy_and_those_before():
    d = digits()
    x = d.train_images.double().div(255)
    assert (torch.equal(d.mean_std[0], x.mean((0, 2, 3)).float()[:, None, None])
            and torch.equal(d.mean_std[1], x.std((0, 2, 3)).float()[:, None, None]))
    assert d.fingerprint == "6b8e28bb30671cd63590ffe76576455f6fe5e0c6d77bb3392a890c507e3b5547"
    assert d.to("cpu").fingerprint == d.fingerprint and torch.equal(torch.stack(d.to("cpu").__dict__["mean_std"]), torch.stack(d.mean_std))
    images, labels = torch.randint(0, 256, (3001, 3, 40, 40), dtype=torch.uint8, generator=gen()), torch.zeros(3001).long()
    big = Dataset("b", images, labels, {"train": range(3000), "test": range(3000, 3001)}, ("0",))
    x = big.train_images.numpy() / 255
    np.testing.assert_allclose(torch.stack(big.mean_std)[:, :, 0, 0].numpy(), [x.mean((0, 2, 3)), x.std((0, 2, 3), ddof=1)], rtol=1e-6)


def few_shot(**more):
    images = torch.arange(6 * 3 * 2 * 2, dtype=torch.uint8).view(6, 3, 2, 2)
    return Dataset(**{"name": "f", "images": images, "labels": torch.tensor([0, 1, 2, 2, 1, 0]),
                      "splits": {"train": (1,), "val": (0,), "test": (2,)}, "classes": ("a", "b", "c"), **more})


def test_few_shot_splits():
    f = few_shot()
    images, labels = f.split("train")
    assert labels.tolist() == [1, 1] and torch.equal(images, f.images[[1, 4]]) and f.counts == {"train": 2, "val": 2, "test": 2}
    assert torch.equal(f.mean_std[0].flatten(), (images.double().mean((0, 2, 3)) / 255).float())
    assert torch.equal(torch.stack(f.to("cpu").__dict__["mean_std"]), torch.stack(f.mean_std)) and f.normalise(images).mean().abs() < 1e-6
    assert len({f.fingerprint, few_shot(splits={"train": (0,), "val": (1,), "test": (2,)}).fingerprint,
                few_shot(labels=(f.labels + 1) % 3).fingerprint}) == 3
    one_line(lambda: f.split("tset"), "unknown split of f 'tset': did you mean 'test'?")
    one_line(lambda: few_shot(splits={"train": (1, 2), "val": (0,), "test": (2,)}),
             "the splits of f share class 'c': a class belongs to one split")
    one_line(lambda: few_shot(splits={"train": (1,), "val": (), "test": (2,)}), "f has no class in split 'val'")


def by_sample(**more):
    images = torch.arange(10 * 1 * 2 * 2, dtype=torch.uint8).view(10, 1, 2, 2)
    return Dataset(**{"name": "s", "images": images, "labels": torch.arange(10) % 3,
                      "splits": {"train": range(0, 6), "test": range(6, 10)}, "classes": ("a", "b", "c"), **more})


def test_fingerprints_stay():
    assert by_sample().fingerprint == "785000da26cba79665acdf0e81fb6433308c3ede997344a18085528334e8e8e0"
    assert few_shot().fingerprint == "a82390fc43be1398e7c588a7f6f3b48f4b4f235dd611f2803aaa5427bd639f18"
    assert (by_sample(name="t").fingerprint == by_sample().fingerprint
            == by_sample(splits=dict(reversed(by_sample().splits.items()))).fingerprint)


def test_a_split_of_samples_is_a_view():
    d = by_sample()
    x, y = d.split("test")
    assert (x.data_ptr() == d.images[6].data_ptr() and y.tolist() == [0, 1, 2, 0] and torch.equal(d.test_images, x)
            and torch.equal(d.train_labels, d.labels[:6]))
    assert not d.by_class and d.counts == {"train": 6, "test": 4} and d.channels == 1
    assert repr(d) == f"s: 6 train and 4 test images, 1 x 2 x 2, 3 classes, {d.fingerprint[:12]}"
    three = by_sample(splits={"train": range(0, 4), "val": range(4, 6), "test": range(6, 10)})
    assert ("4 train, 2 val and 4 test images" in repr(three)
            and three.fingerprint != by_sample(splits={"train": range(0, 4), "test": range(6, 10)}).fingerprint)
    assert repr(few_shot()).startswith("f: train 1 classes (2 images), val 1 classes (2 images), test 1 classes (2 images), 3 x 2 x 2, ")


def test_joining_parts_copies_once_and_keeps_their_order():
    d = by_sample()
    again = joined("s", {"train": d.split("train"), "test": d.split("test")}, d.classes)
    assert again.fingerprint == d.fingerprint and again.splits == d.splits and again.images.is_contiguous()
    turned = joined("s", {s: (x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), y)
                          for s, (x, y) in ((s, d.split(s)) for s in d.splits)}, d.classes)
    assert turned.images.is_contiguous() and torch.equal(turned.images, d.images)


def test_a_set_split_by_samples_is_split_by_class():
    d = by_sample()
    c = d.with_splits({"train": ["a", "c"], "test": ["b"]})
    assert (c.by_class and c.splits == {"train": (0, 2), "test": (1,)} and c.counts == {"train": 7, "test": 3}
            and c.images.data_ptr() == d.images.data_ptr())
    assert (d.with_splits({"train": [0, "c"], "test": [1]}).fingerprint == c.fingerprint != d.fingerprint
            and set(c.test_labels.tolist()) == {1})
    one_line(lambda: digits().with_splits({"train": ["0"], "test": ["ten"]}), "unknown class of digits 'ten'")


@pytest.mark.parametrize("change, expected", [
    ({"splits": {"train": range(0, 6), "test": range(5, 10)}}, "split 'test' of s is range(5, 10): it must be a range of the 10 samples"),
    ({"splits": {"train": range(0, 6), "test": range(6, 11)}}, "shares none with another split"),
    ({"splits": {"train": range(0, 6, 2), "test": range(6, 10)}}, "in steps of 1"),
    ({"splits": {"train": range(0, 6)}}, "s has no image in split 'test'"),
    ({"splits": {"train": range(0, 6), "test": range(6, 6)}}, "s has no image in split 'test'"),
    ({"splits": {"train": range(0, 6), "test": (2,)}}, "must be all ranges of samples or all tuples of class numbers"),
    ({"splits": {"train": (0, 1), "test": (3,)}}, "split 'test' of s names an unknown class 3: classes are numbered from 0 to 2"),
    ({"splits": {"train": (0, 1), "test": ("c",)}}, "names an unknown class 'c'"),
    ({"splits": {"train": (0, 1), "test": (3,)}, "classes": tuple("abcd")}, "class 'd' in split 'test' of s has no image"),
    ({"splits": {"train": (0, 0), "test": (1,)}}, "the splits of s share class 'a'"),
    ({"labels": torch.arange(10)}, "labels of s must be from 0 to 2; got 0 to 9"),
    ({"labels": torch.arange(9) % 3}, "needs uint8 images (N, C, H, W) and labels (N,)"),
    ({"images": torch.zeros(10, 1, 2, 2)}, "got torch.float32 (10, 1, 2, 2)"),
])
def test_what_no_data_set_can_be(change, expected):
    one_line(lambda: by_sample(**change), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_set_moves_to_a_gpu():
    for d in (by_sample(), few_shot()):
        moved = d.to("cuda")
        assert moved.images.is_cuda and moved.split("test")[0].is_cuda and moved.fingerprint == d.fingerprint and moved.mean_std[0].is_cuda


def test_digits_are_split_once_and_without_overlap():
    a, b = load("digits"), load("digits")
    assert a.fingerprint == b.fingerprint and (len(a.train_labels), len(a.test_labels)) == (1000, 797)
    assert a.train_images.dtype == torch.uint8 and a.train_images.shape[1:] == (1, 8, 8)
    assert len(torch.cat([a.train_images, a.test_images]).flatten(1).unique(dim=0)) == 1797, "a test image is also a training image"
    shares = a.test_labels.bincount() / a.train_labels.bincount()
    assert shares.min() > .75 and shares.max() < .85
