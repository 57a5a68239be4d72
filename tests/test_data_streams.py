"""Streams: the contract asked of all of them, episodes against loops, classes in equal numbers, and what is refused."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_helpers import one_line
from helpers import gen
from relkd.data import (Batches, ClassBalanced, Dataset, Episodes, Stream, by_class, colour_jitter, draw_episodes,
                        few_per_class, load, pad_crop)

DATA = load("digits")
CLASSES = DATA.with_splits({"train": "012345", "val": "67", "test": "89"})
STREAMS = {
    "batches": lambda seed: Batches(DATA, 64, seed),
    "few, augmented": lambda seed: Batches(DATA, 32, seed, few_per_class(DATA.train_labels, 10, 1).flip(
        0), ((pad_crop, {"pad": 1}), (colour_jitter, {"brightness": .2, "contrast": .2, "saturation": .2}))),
    "batches of some classes": lambda seed: Batches(CLASSES, 64, seed),
    "episodes": lambda seed: Episodes(CLASSES, "train", 4, 2, 3, seed, 5),
    "episodes of samples": lambda seed: Episodes(DATA, "test", 10, 1, 4, seed, 5),
    "class-balanced": lambda seed: ClassBalanced(CLASSES, "train", 4, 3, seed, 5),
    "class-balanced, of samples": lambda seed: ClassBalanced(DATA, "train", 10, 2, seed),
}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_every_stream_keeps_the_contract(make):
    s = make(5)
    assert isinstance(s, Stream) and s.labels.dim() == 1 and s.labels.dtype == torch.int64 and len(s) >= 1
    steps = list(s.epoch(3))
    assert len(steps) == len(s)
    data = getattr(s, "data")
    for index, images, labels in steps:
        assert index.shape == (s.batch_size,) and index.dtype == torch.int64 and 0 <= index.min() and index.max() < len(s.labels)
        assert images.shape == (s.batch_size, *data.images.shape[1:]) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert isinstance(s, Episodes) or torch.equal(labels, s.labels[index])
        assert len(index.unique()) == len(index), "a sample twice in a batch"
    torch.rand(3)                                                                # the global generator plays no part
    fresh = make(5)
    list(fresh.epoch(0))                                                         # nor do the epochs before
    for (i, x, y), (j, u, v) in zip(steps, fresh.epoch(3), strict=True):
        assert torch.equal(i, j) and torch.equal(x, u) and torch.equal(y, v)
    for other in (make(5).epoch(4), make(6).epoch(3)):
        assert not torch.equal(next(other)[1], steps[0][1])


def test_the_place_is_that_among_the_images_used():
    few = few_per_class(DATA.train_labels, 10, seed=1).flip(0)
    s = Batches(DATA, 25, 7, few)
    assert torch.equal(s.labels, DATA.train_labels[few])
    seen = []
    for place, x, y in s.epoch(2):
        assert torch.equal(x, DATA.normalise(DATA.train_images[few[place]])) and torch.equal(y, DATA.train_labels[few[place]])
        seen.append(place)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(100))


def test_a_stream_must_say_what_it_gives():
    class Empty(Stream):
        pass

    for call in (lambda: len(Empty()), lambda: next(Empty().epoch(0))):
        with pytest.raises(NotImplementedError, match="Empty must"):
            call()


def test_episodes_are_classes_of_their_split():
    s = Episodes(CLASSES, "train", 4, 2, 3, seed=5, length=6)
    assert len(s) == 6 and s.batch_size == 20
    for i, x, y in s.epoch(3):
        of = s.labels[i].view(4, 5)
        assert of.eq(of[:, :1]).all() and len(of[:, 0].unique()) == 4 and y.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert set(of.flatten().tolist()) <= set(CLASSES.splits["train"])
        assert torch.equal(x, CLASSES.normalise(CLASSES.train_images[i]))


def test_class_balanced_batches():
    s = ClassBalanced(CLASSES, "val", 2, 7, seed=1)
    assert s.batch_size == 14 and len(s) == len(s.labels) // 14
    times = torch.zeros(len(s.labels))
    for e in range(20):
        for i, x, y in s.epoch(e):
            rows = y.view(2, 7)
            assert rows.eq(rows[:, :1]).all() and set(rows[:, 0].tolist()) == {6, 7} and len(i.unique()) == 14
            times[i] += 1
    assert times.min() > 0 and len(ClassBalanced(CLASSES, "val", 1, 1, 0, 3)) == 3


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_the_table_of_classes_equals_a_loop(labels):
    labels = torch.tensor(labels)
    t = by_class(labels)
    assert t.classes.tolist() == sorted(set(labels.tolist()))
    for row, n, c in zip(t.index, t.counts.tolist(), t.classes):
        assert row[:n].tolist() == (labels == c).nonzero()[:, 0].tolist() and row[n:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.int64])
def test_the_table_holds_positions_whatever_integers_the_labels_are(dtype):
    """400 positions do not fit into 8 bits: a table of the labels' own type wrapped round, and drew images of other classes."""
    labels = torch.arange(400) % 4
    for mine, same in zip(by_class(labels.to(dtype)), by_class(labels)):
        assert torch.equal(mine, same) and mine.dtype == torch.int64


@pytest.mark.parametrize("labels", [torch.arange(8.), torch.arange(8) > 3, torch.zeros(4, 2, dtype=torch.long)], ids=range(3))
def test_labels_that_are_no_class_numbers_are_refused(labels):
    one_line(lambda: by_class(labels), "labels are class numbers of shape (n,), of an integer type; got (")


@given(st.lists(st.integers(4, 9), min_size=3, max_size=8), st.integers(2, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 99))
def test_episodes_of_classes_that_differ_in_size(counts, way, shot, query, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts), generator=gen(seed))] * 3 + 1
    e = draw_episodes(by_class(labels), way, shot, query, 20, gen(seed))
    of = labels[e]
    assert e.shape == (20, way, shot + query) and of.eq(of[..., :1]).all()
    assert all(len(set(x)) == way for x in of[..., 0].tolist()) and all(len(set(x)) == x.__len__() for x in e.flatten(1).tolist())
    assert torch.equal(e, draw_episodes(by_class(labels), way, shot, query, 20, gen(seed)))


def test_every_class_and_every_image_of_a_class_is_equally_likely_in_every_place():
    labels = torch.tensor([0] * 3 + [1] * 6 + [2] * 4 + [3] * 5)
    e = draw_episodes(by_class(labels), 2, 1, 2, 30_000, gen())
    first = labels[e[:, 0, 0]].bincount() / 30_000
    assert (first - .25).abs().max() < .011                                          # 4 deviations
    for place in range(3):
        inside = e[:, 0, place][labels[e[:, 0, place]] == 1].bincount(minlength=18)[3:9]
        assert (inside / inside.sum() - 1 / 6).abs().max() < .018


def small(splits={"train": (0, 1), "val": (2,), "test": (3,)}):
    labels = torch.tensor((0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3))
    return Dataset("own", torch.zeros(11, 1, 4, 4, dtype=torch.uint8), labels, splits, tuple("abcd"))


@pytest.mark.parametrize("call, expected", [
    (lambda: ClassBalanced(small(), "train", 2, 4, 0), "batches with 4 images a class need 4 images of every class; "
                                                       "class 'a' of the train images of own has 3"),
    (lambda: ClassBalanced(small(), "train", 3, 1, 0), "a batch has from 1 to 2 classes, as many as the train images "
                                                       "of own have, and at least 1 image of each; got classes = 3, images = 1"),
    (lambda: ClassBalanced(small(), "train", 0, 1, 0), "got classes = 0, images = 1"),
    (lambda: ClassBalanced(small(), "train", 1, 0, 0), "got classes = 1, images = 0"),
    (lambda: ClassBalanced(small(), "dev", 1, 1, 0), "unknown split of own 'dev'"),
    (lambda: Episodes(small(), "train", 2, 2, 2, 0), "2 shots and 2 queries need 4 images of every class; "
                                                     "class 'a' of the train classes of own has 3"),
    (lambda: Batches(DATA, 0, 0), "got batch_size = 0 and 1000 positions"),
    (lambda: Batches(DATA, 8, 0, torch.tensor([], dtype=torch.int64)), "got batch_size = 8 and 0 positions"),
    (lambda: Batches(DATA, 8, 0, torch.tensor([0, 1000])), "positions from 0 to 999"),
])
def test_what_cannot_be_drawn(call, expected):
    one_line(call, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_streams_run_where_the_data_are(kind):
    data = CLASSES.to("cuda")
    s = [lambda: Batches(data, 8, 0), lambda: Episodes(data, "train", 3, 1, 1, 0, 2), lambda: ClassBalanced(data, "train", 3, 2, 0)][kind]()
    for a, b in zip(s.epoch(0), s.epoch(0)):
        assert all(t.is_cuda for t in a) and all(map(torch.equal, a, b))
