"""Texts with given embeddings: what is read, what is refused, and the recipe trained on a corpus made up here."""
import sys
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from relkd.data import text
from relkd.data.text import Passages, Ragged, own_texts, read_synsets, wordnet
from relkd.ngrams import HASHES, LONGEST, ngrams
from relkd.models import create, load, manifest
from relkd.recipes.text import ProjectedCosine, text_rows, text_wordnet
from relkd.records import load_records
from relkd.tables.publish import publish
from relkd.tables.recipe import from_file
from relkd.tables.run import run, trained
from relkd.tasks.text import CopyTexts, NGrams, agreement, bags, given_embeddings, in_blocks, neighbours, places, sisters
from relkd.train import Session, Stop, Stopped

WORDS = "small large red green old new".split(), "cat dog horse stone river".split(), "runs sleeps falls".split()
TEXTS = [f"a {a} {n} {v}" for a, n, v in product(*WORDS)]


def embed(texts):
    g = torch.Generator().manual_seed(0)
    of = {w: torch.randn(12, generator=g) for part in WORDS for w in part}
    return torch.stack([sum(of.get(w, torch.full((12,), .1)) for w in t.split()) for t in texts])


def made_up():
    return own_texts(TEXTS, embed, "made up", kinds=[t.split()[2] for t in TEXTS], queries=[t[2:] for t in TEXTS])


RECIPE = replace(text_wordnet, name="own/text", data=made_up, task=CopyTexts(size=6, k=3), student=NGrams(256), seeds=(0,), eval_every=2,
                 schedule=replace(text_wordnet.schedule, epochs=2, batch_size=24),
                 rows=tuple(r for r in text_rows() if r.name in ("Cosine", "RKD-D, l2", "RKD-A", "PKT")))


def test_pieces_of_a_text():
    assert ngrams("A cat!") == ngrams("a  CAT") and ngrams("a cat") != ngrams("a cats")
    assert sorted(ngrams("a cat")) == sorted(ngrams("cat a")) and len(ngrams("cat")) == 1 + 3 + 2    # <cat> and its 3 + 2 pieces
    assert ngrams("...") == [] and ngrams("") == [] and ngrams("一只猫") and len(ngrams("ab " * 5000)) == LONGEST
    assert all(1 <= n <= HASHES for n in ngrams("Zwölf Boxkämpfer"))
    assert Ragged([[5], [7, 8, 9]])[torch.tensor([1, 0])].tolist() == [[7, 8, 9], [5, 0, 0]]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_of_a_file_may_hold_what_python_takes_for_line_ends(end, tmp_path):
    texts = [t.replace(" ", "\u2028", 1) + "\x0c\x85" for t in TEXTS]
    for last in ("", end):
        (tmp_path / "texts.txt").write_bytes((end.join(texts) + last).encode())
        assert own_texts(tmp_path / "texts.txt", embed).texts("train") == own_texts(texts, embed).texts("train")


@pytest.mark.parametrize("change, said", [
    (lambda: own_texts(["", *TEXTS[1:]], embed(TEXTS)), "text 0 is '', without a letter or a digit"),
    (lambda: own_texts([*TEXTS[:-1], "?!"], embed(TEXTS)), "text 89 is '?!'"),
    (lambda: own_texts(TEXTS, embed(TEXTS)[:-1]), "the teacher has 89 rows and the data 90 samples"),
    (lambda: own_texts(TEXTS, embed(TEXTS).fill_(0)), "teacher row 0 is all zeros"),
    (lambda: own_texts("nowhere.txt", embed(TEXTS)), "cannot read texts from nowhere.txt"),
    (lambda: own_texts(TEXTS[:9], embed(TEXTS[:9])), "9 texts; it takes 30"),
    (lambda: own_texts(TEXTS, embed(TEXTS), kinds=["one"]), "90 texts and 1 kinds"),
    (lambda: own_texts(TEXTS, embed, queries=["..."] * 90), "query 0 is '...'"),
    (lambda: CopyTexts(k=9).check(made_up()), "9 neighbours need more texts than 9"),
    (lambda: NGrams(1000)(4, 0), "has 1, 2, 4, ... or 1,048,576 rows; got 1,000"),
    (lambda: made_up().split("trial"), "unknown split of made up 'trial'"),
    (lambda: CopyTexts().loss(None, None), "texts have no loss of their own"),
])
def test_what_cannot_be_is_said_in_one_line(change, said):
    with pytest.raises(ValueError) as error:
        change()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "wordnet_folder", text.wordnet_folder)
    monkeypatch.setattr(text, "data_root", lambda: tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(ValueError, match="apt-get install wordnet-base, or put Princeton's"):
        wordnet()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "wordllama").exists()])
    with pytest.raises(ValueError, match=r'relkd.data.text needs wordllama: pip install "relkd\[text\]"'):
        text.wordllama(["a text"])


def test_synsets_are_read(tmp_path):
    for kind, lines in {"noun": "  1 licence\n00000001 03 n 01 animal 0 000 | a living thing\n"
                                "00000002 05 n 02 cat 0 true_cat 1 001 @ 00000001 n 0000 | a small animal; \"it sat\"\n",
                        "verb": "", "adj": "", "adv": ""}.items():
        (tmp_path / f"data.{kind}").write_text(lines)
    assert list(read_synsets(tmp_path)) == [("a living thing", "animal", ""), ("a small animal", "cat", "n00000001")]
    (tmp_path / "data.adv").write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1 is no synset of WordNet: 'nonsense'"):
        list(read_synsets(tmp_path))


def test_the_bag_is_pytorchs_embedding_bag():
    torch.manual_seed(0)
    x = torch.randint(0, 600, (7, 20)).float()
    x[2] = 0                                                   # nothing to read
    net, theirs = NGrams(256)(5, 3), torch.nn.EmbeddingBag(256, 5, mode="mean")
    theirs.weight.data = net.table.data.clone()
    lists = [((row[row > 0].long() - 1) % 256) for row in x]
    out = net(torch.cat([torch.randn(7, 3), x], 1))
    expected = theirs(torch.cat(lists), torch.tensor([0, *map(len, lists[:-1])]).cumsum(0))
    g = torch.randn(7, 5)
    out.backward(g), expected.backward(g)
    assert torch.allclose(out, expected, atol=1e-6) and torch.allclose(net.table.grad, theirs.weight.grad, atol=1e-6)
    assert out[2].abs().sum() == 0 and bags(x, 256).share[2] == 1


def test_the_three_tests_by_hand():
    e, labels = torch.tensor([[1., 0], [.9, .1], [0, 1], [.1, .9], [-1, 0]]), torch.tensor([0, 1, 0, 0, 2])
    near = neighbours(e, 3 * e, 2, others=True)
    assert near[:2].tolist() == [[1, 3], [0, 3]] and agreement(near, near).tolist() == [2] * 5
    assert sisters(near, labels).tolist() == [1, 1, 1]          # kinds 1 and 2 are alone
    assert places(e, e).tolist() == [0] * 5 and places(torch.ones(3, 2), torch.ones(3, 2)).tolist() == [2] * 3    # ties count against it
    found = in_blocks(torch.tensor([1, 0, 1, 1, 0]), 1, blocks=2)
    assert (found["accuracy"], found["hits"], found["queries"]) == (75., "1 2", 2)


def test_the_recipe_trains_stops_and_goes_on(tmp_path):
    whole = run(RECIPE, Session(out=tmp_path / "whole", device="cpu"))
    by = {r["row"]: r for r in whole}
    assert by["Teacher"]["last"] == 100 and by["Teacher"]["epochs"] == []
    assert set(by["Teacher"]["tests"]) == {"agree", "by distance", "sister", "lemma"}
    assert min(r["last"] for r in whole) > 22                   # by chance: 3 of 8

    class Twice(Stop):
        asked = 0

        def due(self, reserve=0.):
            self.asked += 1
            self.why = "two steps" if self.asked == 3 else None
            return self.asked == 3

    with pytest.raises(Stopped):
        run(RECIPE, Session(out=tmp_path / "cut", device="cpu", stop=Twice()))
    again = {r["row"]: r for r in run(RECIPE, Session(out=tmp_path / "cut", device="cpu"))}
    assert {k: (r["tests"], r["weights"]) for k, r in again.items()} == {k: (r["tests"], r["weights"]) for k, r in by.items()}
    net, data = trained(RECIPE, "RKD-D, l2", 0, Session(out=tmp_path / "cut", device="cpu")), made_up()
    new = Passages(["a small unseen horse", "一匹马"])
    with torch.no_grad():
        assert net(new.packed(width=data.channels)).shape == (2, 6)


def test_recorded_steps_read_their_own_batch(tmp_path):
    """The fault: lists kept with a batch were those of the batch before, once its memory held another."""
    of = replace(RECIPE, rows=RECIPE.rows[:2], schedule=replace(RECIPE.schedule, optimiser="SGD"))    # Adam rounds a rate in memory
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain, on = ([r["weights"] for r in run(of, Session(out=tmp_path / g, device="cpu", graphs=g))] for g in ("off", "on"))
    assert plain == on and any("not replayed but done step by step" in str(w.message) for w in said)
    net, x = NGrams(256)(3, 0), torch.randint(1, 256, (4, 9)).float()
    first = net(x)
    assert net(x).equal(first) and not net(x.copy_(x.flip(0))).equal(first) and net(x).equal(first.flip(0))


def test_a_row_may_have_a_rate_of_its_own(tmp_path):
    rows = [replace(r, rate=f, name=f"{r.name} {f}") for r in RECIPE.rows[:1] for f in (0., 1., .5)]
    plain, one, half = (r["weights"] for r in run(replace(RECIPE, rows=tuple(rows)), Session(out=tmp_path, device="cpu"))[1:])
    assert plain == one != half and "rate x 0.5" in str(rows[2]) and "rate" not in load_records(tmp_path, "own/text")[0]["protocol"]["row"]


def test_components_of_the_teacher():
    data = made_up()
    def tested(axes):
        found = CopyTexts(k=3, axes=axes).test(given_embeddings(0, 12), data)
        return {k.removesuffix(f", {axes} axes"): v["accuracy"] for k, v in found.items()}
    assert CopyTexts(axes=8).headline == "agree, 8 axes"
    assert tested(12)["agree"] < 100 == tested(0)["agree"] and tested(2)["agree"] < tested(8)["agree"]


def test_a_projection_is_trained_with_the_student():
    s, t = torch.randn(5, 3, requires_grad=True), torch.randn(5, 4)
    loss = ProjectedCosine.from_features(s, t)
    loss(s, t).backward()
    assert loss.project.weight.grad is not None and 0 <= loss(s, t) <= 2


FILE = """
from dataclasses import replace
from pathlib import Path

from relkd.data.text import own_texts
from relkd.models import create, load, manifest
from relkd.recipes.text import text_rows, text_wordnet
from relkd.tasks.text import CopyTexts

HERE = Path(__file__).parent


def mine():
    return own_texts(HERE / 'texts.txt', HERE / 'teacher.npy', 'mine')


recipe = replace(text_wordnet, name='mine', title='my texts', data=mine, task=CopyTexts(size=4, k=2), seeds=(0,),
                 rows=text_rows()[:1], schedule=replace(text_wordnet.schedule, epochs=1, batch_size=30), eval_every=1)
"""


def test_ones_own_texts_from_a_file_outside_of_the_package(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    np.save(tmp_path / "teacher.npy", embed(TEXTS).numpy())
    (tmp_path / "mine.py").write_text(FILE)
    mine = from_file(tmp_path / "mine.py")
    run(mine, Session(out=tmp_path / "out", device="cpu"))
    tested = {r["row"]: set(r["tests"]) for r in load_records(tmp_path / "out", "mine")}
    assert tested == {row: {"agree", "by distance"} for row in ("Teacher", "Cosine")}
    assert isinstance(mine.data().passages.given.rows, np.memmap)         # stays on disk


PUBLISHED = "wordnet/ngrams16384x64"


def test_the_published_student_says_where_it_is_from():
    m, root = manifest(PUBLISHED), Path(__file__).resolve().parents[1]
    about = m["about"]
    record = next(r for r in load_records(root / "figures", about["recipe"]) if r["run"] == about["record"]["run"])
    assert (record["row"], record["seed"], record["last"]) == (about["row"], about["seed"], about["accuracy"])
    assert abs(about["accuracy_float16"] - record["last"]) < .1 and record["protocol"]["data"]["fingerprint"] == about["fingerprint"]
    assert "WordNet" in about["licences"]["texts"] and "MIT" in about["licences"]["teacher"] and about["record"]["commit"]
    assert m["bytes"] < 2_100_000 and (m["network"], m["classes"]) == ("ngrams16384x64", None)


def test_the_published_student_reads_any_text():
    net = load(PUBLISHED)
    texts = ["a large wild cat", "A  LARGE, wild cat!", "a ship", "一条河", "zxqw"] * 500
    e = net.encode(texts)
    assert e.shape == (2500, 64) and not e.requires_grad and torch.allclose(e.norm(dim=1), torch.ones(2500))
    assert e[0].equal(e[1]) and torch.allclose(e[:5], e[2000:2005], atol=1e-6)          # more than one batch
    new = Passages(texts[:5])
    assert torch.allclose(e[:5], torch.nn.functional.normalize(net(new.packed(width=net.skip)), dim=1), atol=1e-6)
    assert net.encode(t for t in texts[:2]).shape == (2, 64) and net.encode([]).shape == (0, 64)


@pytest.mark.parametrize("change, said", [
    (lambda net: net.encode("a cat"), "encode takes a list of texts; got one text, 'a cat': put it into a list"),
    (lambda net: net.encode(["a cat", ""]), "text 1 is '', without a letter or a digit"),
    (lambda net: net.encode(["a cat", None]), "text 1 is 'None', without a letter or a digit"),
    (lambda net: create("ngrams1000x4", None, 0), "has 1, 2, 4, ... or 1,048,576 rows; got 1,000"),
    (lambda net: create("ngrams256x4", 10, 0), "ngrams256x4 gives an embedding and classifies nothing: classes=None; got classes = 10"),
    (lambda net: load("wordnet/ngrams16384x6"), f"did you mean '{PUBLISHED}'?"),
])
def test_what_the_published_student_cannot_do_is_said_in_one_line(change, said):
    with pytest.raises(ValueError) as error:
        change(load(PUBLISHED))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_student_of_texts_is_published_without_its_teacher(tmp_path):
    of = replace(RECIPE, data=lambda: replace(made_up(), name="made-up"))
    run(of, Session(out=tmp_path, device="cpu"))
    made, = publish(of, tmp_path / "w", Session(out=tmp_path, device="cpu"))
    best = max((r for r in load_records(tmp_path, "own/text") if r["row"] != "Teacher"), key=lambda r: r["last"])
    assert (made["name"], made["network"], made["about"]["row"]) == ("made-up/ngrams256x6", "ngrams256x6", best["row"])
    net, data = load(made["name"], tmp_path / "w"), made_up()
    assert RECIPE.task.test(net, data)["agree"]["accuracy"] == made["about"]["accuracy_float16"]


def test_any_sentence_transformers_model_by_name(monkeypatch):
    asked = []

    class Model:
        def __init__(self, name):
            asked.append(name)
            if name == "nobody/nothing":
                raise OSError("no such model\nand a long story")

        def encode(self, texts, convert_to_tensor, show_progress_bar):
            assert convert_to_tensor and not show_progress_bar and isinstance(texts, list)
            return 3 * embed(texts).half()

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    data = own_texts(TEXTS, text.sentence_transformer("all-MiniLM-L6-v2"), "mine", queries=[t[2:] for t in TEXTS])
    assert asked == ["all-MiniLM-L6-v2"] and data.channels == 12                      # loaded once, for texts and queries
    assert data.given("train").dtype == torch.float32 and torch.allclose(data.given("train").norm(dim=1), torch.ones(72))
    with pytest.raises(ValueError, match=r"does not load 'nobody/nothing' \(OSError: no such model\): give the name") as error:
        text.sentence_transformer("nobody/nothing")(TEXTS)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="the teacher x needs sentence-transformers: pip install sentence-transformers"):
        text.sentence_transformer("x")(TEXTS)
