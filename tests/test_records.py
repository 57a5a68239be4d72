"""Records: written and read back, old layouts read as today's, damage named; what is called an accuracy is one of the test set."""
import json
import subprocess
from pathlib import Path

import pytest
import torch

from data_helpers import one_line
from relkd.bench.measure import load_benchmarks
from relkd.ground import digest
from relkd.records import (VERSION, _commit, cell_name, environment, load_records, make_record, present, read_record, record_path,
                           to_tensorboard, upgraded, write_record)

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
COST = dict(seconds=1., trained_beside=2, images_per_second=3., processes=1, weights="w", teacher_weights=None)


def record(row="HKD", seed=0, recipe="t", variant=(), accuracy=90.):
    cell = {"recipe": recipe, "row": row, "variant": dict(variant), "seed": seed}
    epochs = [{"epoch": 1, "loss": 2., "accuracy": accuracy + 1}, {"epoch": 2, "loss": None, "accuracy": accuracy}]
    protocol = {"precision": "32-true"}
    return make_record(cell, digest(protocol), protocol, "top-1", {"top-1": {"accuracy": accuracy}}, epochs, CPU, **COST)


def few_shot_record():
    cell, tests = ({"recipe": "t", "row": "RKD-D", "variant": {"shot": 1}, "seed": 0},
                   {"5-way 1-shot": {"accuracy": 55.6, "hits": "1 2"}, "20-way 1-shot": {"accuracy": 40.}})
    return make_record(cell, digest({}), {}, "5-way 1-shot", tests, [{"epoch": 1, "loss": 2., "validation": 50.9}], CPU, **COST)


def test_what_is_written_is_read(tmp_path):
    for r in (record(), few_shot_record()):
        path = write_record(tmp_path, r)
        assert path == record_path(tmp_path, r) and read_record(path) == r and r["version"] == VERSION
        written = json.loads(path.read_text())
        assert written.pop("content") == digest(r) and written == r and not path.read_text().count('"epochs": [\n {')
    assert load_records(tmp_path, "t") == [record(), few_shot_record()]
    assert [p.name for p in sorted(tmp_path.glob("records/t/*"))] == ["hkd-seed0.json", "rkd-d-1-shot-seed0.json"]
    assert cell_name("A + B", {"shot": 5, "size": 64}, 3) == "a+b-5-shot-64-size-seed3"


def test_the_headline_is_a_test_and_the_best_epoch_one_of_the_test_set():
    assert (record()["last"], record()["best"], record()["best_epoch"]) == (90., 91., 1)
    r = few_shot_record()
    assert (r["headline"], r["last"], r["best"], r["best_epoch"]) == ("5-way 1-shot", 55.6, None, None), "50.9 is of validation classes"


def test_records_of_the_first_layout():
    old = {"recipe": "t", "row": "HKD", "seed": 1, "run": "x", "last": 90., "best": 91., "best_epoch": 3, "protocol": {}, "epochs": []}
    new = upgraded(old)
    assert ((new["version"], new["headline"], new["tests"], new["variant"])
            == (1, "top-1", {"top-1": {"accuracy": 90.}}, {}) and "version" not in old)
    few = old | {"row": "RKD-D/1-shot", "method": "RKD-D", "shot": 1, "last": 50.9,
                 "tests": {"5-way 1-shot": {"accuracy": 55.6}}, "epochs": [{"epoch": 1, "accuracy": 50.9}]}
    new = upgraded(few)
    assert ((new["row"], new["variant"], new["last"], new["best"], new["epochs"])
            == ("RKD-D", {"shot": 1}, 55.6, None, [{"epoch": 1, "validation": 50.9}]))
    assert upgraded(record()) == record()


def test_every_committed_record_is_read():
    paths = [p for p in ROOT.glob("figures/records/**/*.json") if "bench" not in p.parts]
    records = [read_record(p) for p in paths]
    assert len(records) > 200
    for p, r in zip(paths, records):
        assert (r["last"] == r["tests"][r["headline"]]["accuracy"] and "precision" in r["protocol"]
                and p.parent.relative_to(ROOT / "figures/records").as_posix() == r["recipe"])
        assert (not any("accuracy" in e and "hits" in next(iter(r["tests"].values()))
                        for e in r["epochs"])), "a validation is not called an accuracy"


@pytest.mark.parametrize("damage, said", [
    (lambda t: t[:50], "JSONDecodeError"), (lambda t: "[]", "AttributeError"), (lambda t: "[" * 100_000, "RecursionError"),
    (lambda t: "{}", "KeyError: 'last'"),
    (lambda t: t.replace('"seed"', '"sead"'), "KeyError: 'seed'"), (lambda t: t.replace('"seed": 0', '"seed": "0"'), "field 'seed'"),
    (lambda t: t.replace('"variant": {}', '"variant": 1'), "field 'variant'"),
    (lambda t: t.replace('"last": 90.0', '"last": null'), "field 'last'"),
])
def test_damaged_records_are_named(tmp_path, damage, said):
    path = write_record(tmp_path, record())
    path.write_text(damage(path.read_text()))
    one_line(lambda: load_records(tmp_path, "t"), f"record {path} is damaged", said, "run the recipe again")


@pytest.mark.parametrize("damage, said", [
    (lambda t: t.replace('"last": 50.0', '"last": 60.0'), "its 'last' is not the accuracy of '5-way 1-shot'"),
    (lambda t: t.replace("50.0", "60.0"), "the hits of '5-way 1-shot' do not give its accuracy"),
    (lambda t: t.replace('"hits": "1 2"', '"hits": "1 9"'), "the hits of '5-way 1-shot' do not give its accuracy"),
    (lambda t: t.replace('"protocol": {}', '"protocol": {"seed": 1}'), "its protocol is not that of its run"),
    (lambda t: t.replace('"headline": "5-way 1-shot"', '"headline": "top-1"'), "its 'last' is not the accuracy of 'top-1'"),
])
def test_a_record_that_contradicts_itself_is_named(tmp_path, damage, said):
    r = few_shot_record()
    r["tests"]["5-way 1-shot"] |= {"queries": 3, "hits": "1 2", "accuracy": 50.}
    r["last"] = 50.
    path = write_record(tmp_path, r)
    assert load_records(tmp_path, "t") == [r]
    path.write_text(damage(path.read_text()))
    one_line(lambda: load_records(tmp_path, "t"), f"record {path} was changed after it was written", said)


def test_any_change_of_a_record_is_told(tmp_path):
    """The fault: another figure of one epoch, another name of a row, and the table was another without a word."""
    path = write_record(tmp_path, record())
    text = path.read_text()
    for old, new in (('"loss": 2.0', '"loss": 3.0'), ('"row": "HKD"', '"row": "HKE"'), ('"seconds": 1.0', '"seconds": 2.0')):
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        one_line(lambda: read_record(path), "was changed after it was written (its content is another)")


@pytest.mark.parametrize("field, value", [
    ("row", "\x1b[2Jrow"), ("row", "a\nb"), ("row", ""), ("row", "x" * 300), ("best", "90"), ("last", float("nan")), ("last", 1e300),
    ("epochs", [3]), ("epochs", [{"epoch": 1, "loss": "2"}]), ("tests", {"top-1": None}), ("variant", {"shot": [1]}),
    ("seed", "/../../../escaped"), ("headline", "\u202etop-1"),
])
def test_a_record_of_another_form_is_damaged(tmp_path, field, value):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(record() | {field: value}))
    one_line(lambda: read_record(path), f"record {path} is damaged")


def test_a_recipe_of_a_record_does_not_lead_out_of_its_folder(tmp_path):
    one_line(lambda: write_record(tmp_path / "out", record(recipe="../../escaped")), "is no way out of its folder")
    assert not list(tmp_path.iterdir())


def test_a_place_in_a_record_is_no_path():
    assert "/" not in cell_name("../row", {"../../x": "/etc"}, 0)


def test_missing_records_and_a_folder_in_the_place_of_one(tmp_path):
    one_line(lambda: load_records(tmp_path, "t"), f"no records of 't' in {tmp_path}/records/t: run the recipe first")
    one_line(lambda: load_records(tmp_path / "figures", "t"), "there is no such folder: the committed ones lie in the repository")
    one_line(lambda: load_benchmarks(tmp_path / "figures"), "there is no such folder: the committed ones lie in the repository")
    (tmp_path / "records/t/x.json").mkdir(parents=True)
    one_line(lambda: load_records(tmp_path, "t"), "x.json is damaged (IsADirectoryError")


def test_the_environment_is_of_the_start_and_needs_no_git(monkeypatch):
    def no_git(*a, **k):
        raise FileNotFoundError("git")

    _commit.cache_clear()
    monkeypatch.setenv("RELKD_COMMIT", "given")
    assert environment(CPU)["commit"] == "given"
    monkeypatch.delenv("RELKD_COMMIT")
    assert environment(CPU)["commit"] == "given", "asked once"
    _commit.cache_clear()
    monkeypatch.setattr(subprocess, "run", no_git)
    found = environment(CPU)
    assert found["commit"] is None and found["versions"]["torch"] == torch.__version__ and "CPU" in found["device"]
    _commit.cache_clear()


def test_event_files_call_a_validation_what_it_is(tmp_path, monkeypatch):
    import torch.utils.tensorboard as tb

    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = Path(folder).relative_to(tmp_path).as_posix()

        def __enter__(self):
            return self

        def __exit__(self, *a):
            pass

        def add_scalar(self, *a):
            written.append((self.folder, *a))

    monkeypatch.setattr(tb, "SummaryWriter", Writer)
    assert to_tensorboard([record(recipe="a/b"), few_shot_record()], tmp_path) == 2
    assert written == [("a-b/hkd-seed0", "loss", 2., 1), ("a-b/hkd-seed0", "accuracy", 91., 1), ("a-b/hkd-seed0", "accuracy", 90., 2),
                       ("t/rkd-d-1-shot-seed0", "loss", 2., 1), ("t/rkd-d-1-shot-seed0", "validation", 50.9, 1)]


def test_what_only_the_repository_has_is_named(tmp_path):
    assert present(tmp_path) == tmp_path
    one_line(lambda: present(tmp_path / "a.csv"), f"no a.csv in {tmp_path}")
    one_line(lambda: present(tmp_path / "b" / "a.csv"), "there is no such folder: the committed ones lie in the repository, in figures/")
