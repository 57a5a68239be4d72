"""Resizing and augmentation against loops over images."""
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import one_line
from helpers import gen
from relkd.data import Batches, area_resize, colour_jitter, flip, joined, pad_crop, rotate


@settings(max_examples=25)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6))
def test_area_resize_equals_block_means_of_the_enlarged_image(h, w, size, seed):
    size = min(size, h, w)
    x = torch.rand(2, 3, h, w, generator=gen(seed)).double()
    big = x.repeat_interleave(size, 2).repeat_interleave(size, 3)                # every old pixel becomes size x size
    want = big.view(2, 3, size, h, size, w).mean((3, 5))
    torch.testing.assert_close(area_resize(x, size), want, atol=1e-5, rtol=1e-5)


def test_area_resize_of_bytes_and_beyond():
    x = torch.randint(0, 256, (2, 1, 105, 105), dtype=torch.uint8, generator=gen())
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
    return torch.stack([255 * TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x / 255, b.item()), c.item()),
                                                   s.item()) for x, (b, c, s) in zip(images, factors)])


def bytes_of(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen(seed))


@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (5, 1, 28, 28), (4, 3, 20, 33), (3, 3, 31, 16)])
@pytest.mark.parametrize("degrees", [0, 15, 180])
def test_rotate_equals_torchvisions_image_by_image(shape, degrees):
    x = bytes_of(shape)
    torch.testing.assert_close(rotate(x.float(), degrees, gen(3)), rotate_loop(x.float(), degrees, gen(3)), atol=.05, rtol=0)
    got, want = rotate(x, degrees, gen(3)), rotate_loop(x, degrees, gen(3))
    assert got.dtype == torch.uint8 and (got.int() - want.int()).abs().max() <= 1
    assert degrees or torch.equal(got, x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("amounts", [(.4, .4, .4), (0., 0., 0.), (1.5, .2, .9), (0., 1., 2.)])
def test_colour_jitter_equals_torchvisions_image_by_image(channels, amounts):
    x = bytes_of((9, channels, 12, 10))
    want = jitter_loop(x.float(), amounts, gen(4))
    torch.testing.assert_close(colour_jitter(x.float(), *amounts, gen(4)), want, atol=.01, rtol=0)
    got = colour_jitter(x, *amounts, gen(4))
    assert got.dtype == torch.uint8 and (got.float() - want).abs().max() <= .51 and (any(amounts) or torch.equal(got, x))


def test_colour_jitter_needs_colours():
    one_line(lambda: colour_jitter(torch.zeros(2, 4, 5, 5), .1, .1, .1, gen()),
             "colour_jitter needs images of 1 or 3 channels; got (2, 4, 5, 5)")


@pytest.mark.parametrize("f, options", [(rotate, {"degrees": 30}), (colour_jitter, {"brightness": .5, "contrast": .5, "saturation": .5})])
def test_each_image_draws_its_own_and_keeps_its_type(f, options):
    x = bytes_of((1, 3, 16, 16)).expand(6, -1, -1, -1)
    for kind in (torch.uint8, torch.float32, torch.float64):
        y = f(x.to(kind), generator=gen(), **options)
        assert y.dtype == kind and y.shape == x.shape and len(y.flatten(1).unique(dim=0)) == 6 and y.min() >= 0 and y.max() <= 255
        assert torch.equal(y, f(x.to(kind), generator=gen(), **options))


def test_epochs_with_the_new_augmentations_depend_on_seed_and_number_alone():
    images = bytes_of((40, 3, 12, 12))
    labels = torch.arange(40) % 4
    data = joined("d", {"train": (images, labels), "test": (images[:4], labels[:4])}, "abcd")
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


def test_pad_crop_and_flip_equal_a_loop_over_images():
    x = torch.arange(5 * 2 * 6 * 4).view(5, 2, 6, 4).float() + 1
    got = pad_crop(x, 2, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    top, left = (torch.randint(0, 5, (5, 1), generator=g) for _ in range(2))
    padded = torch.nn.functional.pad(x, (2,) * 4)
    assert torch.equal(got, torch.stack([p[:, t:t + 6, l:l + 4] for p, t, l in zip(padded, top[:, 0], left[:, 0])]))
    mirrored = flip(x.repeat(8, 1, 1, 1), torch.Generator().manual_seed(0))
    turned = [torch.equal(m, a.flip(2)) for m, a in zip(mirrored, x.repeat(8, 1, 1, 1))]
    assert all(t or torch.equal(m, a) for t, m, a in zip(turned, mirrored, x.repeat(8, 1, 1, 1))) and 0 < sum(turned) < 40
