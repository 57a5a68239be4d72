"""Publishing: the teacher and the best student of a finished recipe, in both kinds of task, with their record; and what is missing."""
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_helpers import one_line
from helpers import few_shot_toy, split_digits, toy
from relkd.data import load as load_data
from relkd.ground import digest
from relkd.models import create, load, manifest, rounded, save
from relkd.tables.publish import publish
from relkd.tables.recipe import recipe
from relkd.tables.run import run, trained
from relkd.tasks.classify import evaluate
from relkd.train import Session
from relkd.train.session import bf16_is_native

TINY = recipe("digits").reduced(rows=["RKD-D", "HKD"], seeds=[1, 0], epochs=1)
NAMES = ["digits/resnet14", "digits/resnet8x0.5"]


def session(out, **more):
    return Session(out, "cpu", **more)


def files(folder):
    return [p.relative_to(folder).as_posix() for p in sorted(Path(folder).rglob("*")) if p.is_file()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, run(TINY, session(out))


def copy_of(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def test_the_teacher_and_the_best_row_of_the_first_seed_are_published(finished, tmp_path):
    out, records = finished
    made = publish(TINY, tmp_path, session(out))
    mean = {row: sum(r["last"] for r in records if r["row"] == row) / 2 for row in ("RKD-D", "HKD")}
    best, data = max(mean, key=mean.get), load_data("digits")
    assert [m["name"] for m in made] == NAMES and made == [manifest(m["name"], tmp_path) for m in made]
    for m, row in zip(made, ("Teacher", best)):
        a, r = m["about"], next(r for r in records if r["row"] == row and r["seed"] == 1)
        assert ((a["row"], a["seed"], a["recipe"], a["data"], a["fingerprint"], a["precision"], a["cut"])
                == (row, 1, "digits-1epochs", "digits", data.fingerprint, "32-true", TINY.cut))
        assert (a["test"] == "top-1" and a["accuracy"] == r["last"] == a["record"]["accuracy"]
                and abs(a["accuracy_float16"] - a["accuracy"]) < 3)
        assert evaluate(load(m["name"], tmp_path), data) == a["accuracy_float16"], "the file has the accuracy that the manifest states"
        path = out / a["record"]["path"]
        written = json.loads(path.read_text())
        assert (written.pop("content") and written == r and a["record"]["run"] == r["run"]
                and a["record"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest())
        x, i = data.test_images[:7], a["input"]
        mean_, std = (torch.tensor(i[k])[:, None, None] for k in ("mean", "std"))
        assert list(x.shape[1:]) == i["shape"] and ((x.float() / 255 - mean_) / std).equal(data.normalise(
            x)), "the manifest tells what to feed"
        assert str(out) not in json.dumps(m) and a["class_names"] == [str(k) for k in range(10)]
    assert f"({mean[best]:.2f} %) of RKD-D, HKD over seeds 1, 0" in made[1]["about"]["chosen"] and "chosen" not in made[0]["about"]


def test_fewer_rows_and_seeds_can_be_published_and_the_plain_student_never(finished, tmp_path, flags):
    if "slow" not in flags:
        pytest.skip("several runs more: --flags slow")
    for row in ("RKD-D", "HKD"):
        made = publish(TINY.reduced(rows=[row], seeds=[0]), tmp_path, session(finished[0]))
        assert [(m["about"]["row"], m["about"]["seed"]) for m in made] == [("Teacher", 0), (row, 0)]


def test_a_few_shot_recipe_is_published_too(tmp_path):
    """conv4 as teacher and as student: their names say which is which, and they have no classifier."""
    r = few_shot_toy(teacher="resnet8x0.5", student="resnet8x0.5", seeds=(0,), vary={"shot": (1,)})
    records = run(r, session(tmp_path))
    made = publish(r, tmp_path / "w", session(tmp_path))
    assert ([m["name"] for m in made] == ["digits/resnet8x0.5-teacher", "digits/resnet8x0.5-student"]
            and [m["classes"] for m in made] == [None, None])
    for m, row in zip(made, ("Teacher", "RKD-D")):
        a = m["about"]
        assert ((a["test"], a["row"], a["variant"]) == ("2-way 1-shot", row, {"shot": 1})
                and a["accuracy"] == next(x["last"] for x in records if x["row"] == row))
        net = load(m["name"], tmp_path / "w")
        assert r.task.test(net, split_digits())["2-way 1-shot"]["accuracy"] == a["accuracy_float16"]
    x = split_digits().normalise(split_digits().images[:4])
    assert net(x).equal(rounded(trained(r, "RKD-D", 0, session(tmp_path)))(x))


def test_a_run_in_bf16_is_found_by_its_recipe_or_by_the_sessions_precision(tmp_path, flags):
    if not bf16_is_native() and "slow" not in flags:
        pytest.skip("this CPU multiplies bf16 slowly: --flags slow")
    one = recipe("digits").reduced(rows=["RKD-D"], seeds=[3], epochs=1)
    for r, precision in ((replace(one, precision="bf16", together=True), None), (one, "bf16")):
        out = tmp_path / str(precision)
        run(r, session(out, precision=precision))
        made = publish(r, tmp_path / "w", session(out, precision=precision))
        assert [(m["about"]["row"], m["about"]["precision"]) for m in made] == [("Teacher", "bf16-mixed"), ("RKD-D", "bf16-mixed")]
    one_line(lambda: publish(one, tmp_path / "w", session(out, precision="32")), "2 of 2 are not in", "or of another protocol")


def test_weights_of_another_recipe_are_not_replaced(finished, tmp_path):
    about = {"recipe": "digits/losses"}
    save(create("resnet8x0.5", 10, 1), NAMES[1], "resnet8x0.5", 10, 1, tmp_path, about=about)
    one_line(lambda: publish(TINY, tmp_path, session(finished[0])),
             f"{NAMES[1]} in {tmp_path} is of recipe digits/losses: name another folder with --weights, or remove it")
    assert manifest(NAMES[1], tmp_path)["about"] == about and len(files(tmp_path)) == 2, "the teacher is not written either"


def test_what_is_missing_is_said_and_what_to_do(finished, tmp_path):
    out, to = copy_of(finished, tmp_path), tmp_path / "w"
    call = lambda: one_line(lambda: publish(TINY, to, session(out)))                # noqa: E731
    record = out / "records/digits-1epochs/rkd-d-seed0.json"
    text = record.read_text()
    record.unlink()
    assert "1 of 5 are not in" in call() and "(RKD-D seed 0): run the recipe to its end first" in call()
    other = json.loads(text)
    del other["content"]
    other["protocol"]["source"] = "another"
    record.write_text(json.dumps(other | {"run": digest(other["protocol"])}))
    assert "1 of 5 are not in" in call() and "or of another protocol (RKD-D seed 0)" in call()
    record.write_text(text)
    for path in (out / ".runs/digits-1epochs").glob("teacher-seed1.ckpt*"):
        path.unlink()
    assert (call().startswith("the weights of Teacher seed 1 of digits-1epochs are not in")
            and "run the recipe again, which trains what has no checkpoint" in call())
    empty = one_line(lambda: publish(TINY, to, session(tmp_path / "empty")), "5 of 5 are not in")
    assert empty.count("seed") == 3 and not to.exists()


def test_weights_and_record_must_be_of_one_run(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    record = out / "records/digits-1epochs/teacher-seed1.json"
    other = json.loads(record.read_text())
    del other["content"]                                     # a record of an earlier version has none
    other["tests"][other["headline"]]["accuracy"] = other["last"] = 99.9
    record.write_text(json.dumps(other))
    one_line(lambda: publish(TINY, tmp_path / "w", session(out)), "the record of Teacher seed 1 of digits-1epochs in",
             "run the recipe again, which writes the records of its checkpoints")
    run(TINY, session(out))
    publish(TINY, tmp_path / "w", session(out))


@pytest.mark.parametrize("wrong, message", [
    (TINY.reduced(rows=["Student"]), "digits-1epochs has no distilled row to publish: keep one of its rows beside the plain student"),
    (toy(), "toy has a network of your own, and a manifest names one of relkd.models"),
])
def test_recipes_that_cannot_be_published(tmp_path, wrong, message):
    one_line(lambda: publish(wrong, tmp_path / "w", session(tmp_path)), message)
    assert not files(tmp_path)


def test_the_command_prints_one_line_a_network(finished, tmp_path, typed):
    code, said, error = typed("publish", "digits", "--epochs", 1, "--rows", "RKD-D,HKD", "--seeds", "1", "--out",
                              finished[0], "--weights", tmp_path, "--device", "cpu")
    made, lines = [manifest(n, tmp_path) for n in NAMES], said.splitlines()
    assert code == 0 and len(lines) == 2 and error == ""
    for line, m in zip(lines, made):
        a = m["about"]
        assert (line.split()[0] == m["name"] and f"{a['accuracy']:.2f} % in float32, {a['accuracy_float16']:.2f} % in "
                                                 f"float16, {m['bytes']:,} bytes in 1 part ({a['row']}, seed 1)" in line)
    code, said, error = typed("publish", "digits", "--out", tmp_path, "--weights", tmp_path)
    assert code == 2 and said == "" and error.count("\n") == 1 and "run the recipe to its end first" in error
