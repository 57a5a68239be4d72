"""What the tests of the data share: where real data lie, errors of one line, and data sets in miniature on disk."""
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relkd.data import data_root

REAL = data_root() if data_root().is_dir() else Path(__file__).resolve().parents[1] / ".data"


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


def jpeg(seed, mode="RGB", size=64):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size)).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


IDS = ("n02124075", "n01443537")


def tiny(root, **change):
    """The publisher's layout: two classes, 3 train and 2 val images each; one is grey, one path leaves the archive."""
    entries = {"wnids.txt": "\n".join(IDS) + "\n",
               "words.txt": "n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\nn09999999\tnot here\n",
               "val/val_annotations.txt": "".join(f"val_{i}.JPEG\t{IDS[i % 2]}\t0\t0\t62\t62\n" for i in range(4)),
               "test/images/test_0.JPEG": jpeg(99)}
    entries |= {f"train/{w}/images/{w}_{i}.JPEG": jpeg(10 * k + i, "L" if (k, i) == (1, 2) else "RGB")
                for k, w in enumerate(IDS) for i in range(3)}
    entries |= {f"train/{w}/{w}_boxes.txt": "x" for w in IDS} | {f"val/images/val_{i}.JPEG": jpeg(50 + i) for i in range(4)}
    entries |= {"../../evil.JPEG": jpeg(7), "train/../../evil/images/evil_0.JPEG": jpeg(8),
                "train/n01443537/images/../../../../evil_0.JPEG": jpeg(9)}
    root.mkdir(exist_ok=True)
    path = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in (entries | change).items():
            if content is not None:
                z.writestr(f"tiny-imagenet-200/{name}", content)
    return path


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


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
    (folder / "characters.csv").write_text("label,subset,alphabet,character\n"
                                           + "".join(f"{i},{','.join(r)}\n" for i, r in enumerate(rows)))
    return images, rows
