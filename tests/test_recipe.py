"""Recipes: what was cut is said, one value changed is another experiment, a description tells things apart,
and a user's file is a recipe."""
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from data_helpers import one_line
from helpers import few_shot_toy, tiny, toy
from relkd.catalogue import known_recipes
from relkd.distill import Objective, Row, Stage, Term
from relkd.features import Features
from relkd.ground import digest
from relkd.models import create
from relkd.models.imagenet import ImageNet
from relkd.recipes.text_students import TokenTable
from relkd.recipes.omniglot import few_shot_rows, omniglot_paper
from relkd.tables.recipe import Recipe, described, from_file, recipe

PAPERS = {name: recipe(name) for name in known_recipes()}


# --- less of it

@given(st.sampled_from(sorted(PAPERS)), st.integers(1, 9), st.booleans())
def test_what_was_cut_is_never_forgotten(name, epochs, twice):
    r = PAPERS[name]
    if epochs >= r.schedule.epochs:
        return
    new = r.reduced(epochs=epochs)
    assert r.cut in new.cut and f"{epochs} of {r.schedule.epochs} epochs" in new.cut and new.name == f"{name}-{epochs}epochs"
    if r.teacher_schedule:
        assert f"(teacher {new.teacher_schedule.epochs} of {r.teacher_schedule.epochs})" in new.cut
    if twice and epochs > 1:
        last = new.reduced(epochs=epochs - 1)
        assert f"{epochs - 1} of {epochs} epochs" in last.cut and new.cut in last.cut and r.cut in last.cut
    assert new.cut in str(new)


def test_a_recipe_that_is_cut_down_already_says_both():
    """The fault: `relkd run cifar100/cpu --epochs 2` forgot that rows, images and pair were cut as well."""
    cut = recipe("cifar100/cpu").reduced(epochs=2).cut
    assert cut.startswith("2 of 12 epochs (teacher 1 of 8); ") and "4 of 9 rows, a fifth of the images" in cut
    assert "400 of 10,000 training episodes" in recipe("cifar_fs/cpu").reduced(epochs=2).cut


def test_the_base_row_is_kept_and_the_teacher_is_a_row_in_both_kinds():
    for r, base in ((toy(), "Student"), (few_shot_toy(), "Teacher")):
        only = r.reduced(rows=["Teacher"])
        assert only.row_names == (["Student", "Teacher"] if base == "Student" else ["Teacher"]) and only.base == base
        some = r.reduced(rows=[r.rows[-1].name.lower()])
        assert some.row_names == (["Student", "HKD", "Teacher"] if base == "Student" else ["Teacher", "RKD-D"])
        assert (r.reduced().row_names == r.row_names and r.reduced(rows=[]).row_names == only.row_names
                and r.reduced(seeds=[3, 3, 1]).seeds == (3, 1))
    assert few_shot_toy().runs == 6 and few_shot_toy().reduced(shot=(2,)).runs == 3 and toy(seeds=(0, 1), together=True).runs == 7


@pytest.mark.parametrize("call, message", [
    (lambda r: r.reduced(rows=["HDK"]), "unknown row of toy 'HDK': did you mean 'HKD'?"),
    (lambda r: r.reduced(seeds=[-1]), "seeds are whole numbers from 0; got [-1]"),
    (lambda r: r.reduced(seeds=[]), "seeds are whole numbers from 0; got []"),
    (lambda r: r.reduced(epochs=0), "a schedule needs at least 1 epoch; got 0"),
    (lambda r: r.reduced(epochs=-3), "a schedule needs at least 1 epoch; got -3"),
    (lambda r: r.reduced(shot=(1,)), "toy has no axis 'shot': it has none beside the seeds"),
    (lambda r: few_shot_toy().reduced(shot=(3,)), "few-shot-toy has shot 1, 2; got 3"),
    (lambda r: few_shot_toy().reduced(shot=()), "got none"),
    (lambda r: few_shot_toy().reduced(size=(3,)), "few-shot-toy has no axis 'size': its axes are shot"),
    (lambda r: replace(r, rows=(Row("A"), Row("A"))), "row names of toy differ from each other and from 'Teacher'; got 'A'"),
    (lambda r: replace(r, rows=(Row("Teacher"),)), "got 'Teacher'"),
    (lambda r: replace(r, vary={"shots": (1,)}), "unknown field of Classify to vary 'shots'"),
    (lambda r: replace(r, task=type(r.task)), "task of toy must be a Task; got the class Classify: write task=Classify(...)"),
    (lambda r: replace(r, schedule=3), "schedule of toy must be a Schedule; got 3: write schedule=Schedule(...)"),
    (lambda r: replace(r, rows=r.rows[0]), "rows of toy must be a tuple of Rows; got Row(name='Student'"),
    (lambda r: replace(r, rows=("Student",)), "rows of toy must be a tuple of Rows; got 'Student': write Row('Student')"),
    (lambda r: replace(r, data=3), "data of toy must be a name, a folder or a function () -> Dataset; got 3"),
    (lambda r: Row("HKD", Term("KD")), "terms of row 'HKD' must be a tuple of Terms; got a Term alone: write (Term(...),)"),
    (lambda r: Row("HKD", before=(Term("KD"),)), "before of row 'HKD' must be a tuple of Stages; got Term("),
    (lambda r: Row(Term("KD")), "a row begins with its name, like Row('mine', ...); got Term("),
    (lambda r: Stage(("KD",), 1), "terms of a stage must be a tuple of Terms; got 'KD': write (Term(...),)"),
    (lambda r: r.with_value("schedule.rate", 1), "--set schedule.rate: unknown field of Schedule 'rate'"),
    (lambda r: r.with_value("schedule.lr", "fast"), "--set schedule.lr: 'fast' is a str, where 0.05 is a float"),
    (lambda r: r.with_value("schedule.lr.x", 1), "--set schedule.lr.x: 0.05 has no field 'x'"),
    (lambda r: r.with_value("rows.RKD.terms.0.weight", 1), "--set rows.RKD.terms.0.weight: unknown item 'RKD'"),
    (lambda r: r.with_value("schedule.epochs", 0), "a schedule needs at least 1 epoch; got 0"),
    (lambda r: r.with_value("schedule.milestones", 5), "--set schedule.milestones: 5 is one value, where several stand"),
    (lambda r: r.with_value("seeds", 3), "--set seeds: 3 is one value, where several stand (0): write (3,)"),
    (lambda r: r.with_value("rows", "abc"), "--set rows: 'abc' is one value, where several stand (Student"),
    (lambda r: r.with_value("rows", ("abc",)), "--set rows: 'abc' is no Row: change a field of it"),
    (lambda r: r.with_value("rows.HKD.terms.0.options.T", "hot"), "'hot' is a str, where"),
    (lambda r: few_shot_toy().with_value("teacher_schedule.epochs", 3),
     "the teacher of few-shot-toy follows the students' schedule: change schedule.epochs"),
    (lambda r: r.with_value("eval_every", 0), "eval_every is a number of epochs, at least 1; got 0"),
    (lambda r: r.with_value("baseline", "nothing"), "unknown row of toy as its baseline 'nothing'"),
    (lambda r: r.with_value("seeds", (0, 0)), "seeds differ from each other; got [0, 0]"),
    (lambda r: few_shot_toy().with_value("task.shot", 7),
     "few-shot-toy is run for each shot of 1, 2: change vary.shot, such as to (7,)"),
    (lambda r: few_shot_toy().with_value("vary.shot", 1), "--set vary.shot: 1 is one value, where several stand (1, 2)"),
    (lambda r: recipe("digit"), "unknown recipe 'digit': did you mean 'digits'?"),
    (lambda r: recipe("nowhere.py"), "no file nowhere.py: name a recipe, or a Python file that defines one"),
])
def test_errors_are_one_line(call, message):
    one_line(lambda: call(toy()), message)


# --- one value

@pytest.mark.parametrize("path, value, read", [
    ("schedule.lr", .5, lambda r: r.schedule.lr), ("schedule.lr", 1, lambda r: r.schedule.lr),
    ("task.labelled", None, lambda r: r.task.labelled),
    ("rows.HKD.terms.0.weight", 3., lambda r: r.rows[2].terms[0].weight),
    ("rows.2.terms.0.options.T", 2., lambda r: r.rows[2].terms[0].options["T"]),
    ("precision", "bf16", lambda r: r.precision), ("precision", 32, lambda r: int(r.precision)),
    ("schedule.milestones", [1, 2], lambda r: list(r.schedule.milestones)),
    ("data_options.resize", "nearest", lambda r: r.data_options["resize"]),
])
def test_one_value_changed_is_another_experiment_that_says_so(path, value, read):
    old, new = toy(cut="3 of 5 rows"), toy(cut="3 of 5 rows").with_value(path, value)
    assert (read(new) == value and new.name.startswith(f"toy-{path}=".lower().replace(" ", ""))
            and new.cut.startswith(f"3 of 5 rows; {path} = {value!r} instead of "))
    assert replace(new, name="toy", cut="x") != replace(old, cut="x") and str(old) != str(new)
    assert all(c.isalnum() or c in "./=+-_" for c in new.name)


def test_several_values_are_all_said():
    r = toy().with_value("schedule.lr", .5).with_value("schedule.momentum", 0.).reduced(epochs=1)
    assert (r.name == "toy-schedule.lr=0.5-schedule.momentum=0.0-1epochs" and r.cut.count(";") == 2
            and (r.schedule.lr, r.schedule.momentum) == (.5, 0.))


# --- a description

def f(s, t): return (s - t).mean()                                                      # noqa: E704
def g(s, t): return (s + t).mean()                                                      # noqa: E704


def with_margin(margin):
    def loss(s, t): return (s - t).mean() + margin                                      # noqa: E704
    return loss


def test_a_description_tells_things_apart_and_does_not_depend_on_where_they_lie():
    things = [f, g, partial(f, t=1), partial(f, t=2), partial(g, t=1), with_margin(1.), with_margin(2.), lambda s: s,
              nn.Linear, tiny, "f", None, 3, 3.5, (1, 2), {"a": f}, Term(f), Term(g), toy().task]
    found = [digest(described(t)) for t in things]
    assert len(set(found)) == len(found) and found == [digest(described(t)) for t in things]
    assert digest(described(with_margin(1.))) == digest(described(with_margin(1.)))
    assert (described(Term("KD"))["loss"] == "KD" and described(create) == "create" and described(f)["name"] == "f"
            and described(toy().task)["kind"] == "Classify")
    assert described((1, [2, {3: None}])) == [1, [2, {"3": None}]]


def test_functions_without_source_text_are_told_apart_too():
    from relkd.tables.described import described

    texts = ["lambda s: s + 1", "lambda s: s + 2", "lambda s: s.a", "lambda s: s.b", "lambda s: [i + 1 for i in s]",
             "lambda s: [i + 2 for i in s]"]
    code = f"from relkd.tables.described import described; print(*(described(eval(t))['source'] for t in {texts}))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = [described(eval(t))["source"] for t in texts]
    assert here == there and len(set(here)) == 6


# --- recipes that are there

def test_every_recipe_is_found_by_itself_and_is_whole():
    assert {"digits", "digits/losses", "digits/balanced", "cifar100/paper", "cifar100/crd", "cifar100/cpu",
            "omniglot/paper", "omniglot/cpu", "miniimagenet/paper", "cifar_fs/cpu"} <= set(PAPERS)
    for name, r in PAPERS.items():
        text = str(r)
        assert ((r.name, r.title) == (name, known_recipes()[name]) and all(f"row {x.name}" in text for x in r.rows)
                and ("cut down" in text) == bool(r.cut))
        assert (bool(r.cut) == ("cpu" in name or name.startswith(("cifar100/losses", "metric/cifar100", "metric/omniglot")))
                and r.base in r.row_names)


def test_every_layer_that_a_recipe_names_exists():
    wanted = {}
    for r in PAPERS.values():
        outputs, channels = (10 if r.task.headline == "top-1" else None), 1 if r.data in ("digits", "omniglot") else 3
        for o in (Objective(row, r.task) for row in r.rows):
            wanted.setdefault((r.student, outputs, channels), set()).update(o.student_layers)
            wanted.setdefault((r.teacher, outputs, channels), set()).update(o.teacher_layers)
    assert len(wanted) > 8
    for network, layers in wanted.items():
        with torch.device("meta"):
            name, *others = network
            files = {"pretrained": False} if isinstance(name, ImageNet) else {"cut": False} if isinstance(name, TokenTable) else {}
            Features(create(replace(name, **files) if files else name, *others), layers)


def test_where_attention_finds_positions():
    for pixels, channels, last in ((28, 1, "layer4.relu"), (32, 3, "layer4"), (84, 3, "layer4")):
        term, = next(r for r in few_shot_rows(last) if r.name == "Attention").terms
        with torch.no_grad():
            found = Features(create("conv4", None, channels), [term.student])(torch.zeros(2, channels, pixels, pixels))[term.student]
        assert found.dim() == 4 and found.shape[2] * found.shape[3] > 1, pixels


def test_the_recipes_are_those_of_the_papers():
    o, m = omniglot_paper, PAPERS["miniimagenet/paper"]
    assert (o.task.way, o.task.query, o.schedule.epochs * o.task.length, o.schedule.milestones[0] * o.task.length,
            o.task.test_episodes, o.task.ways, o.vary) == (60, 5, 10_000, 2_000, 1000, (5, 20), {"shot": (1, 5)})
    assert (m.task.way, m.task.query, m.task.test_episodes, m.task.ways) == (20, 15, 600, (5,))
    weights = {r.name: [t.weight for t in r.terms] for r in o.rows}
    assert weights["RKD-D"] == [50.] and weights["RKD-DA"] == [25., 50.], "halved together"
    assert {row: n for (row, test), n in o.quoted.items() if test == "20-way 1-shot"} == {"Teacher": 95.11, "RKD-D": 95.45, "RKD-DA": 95.52}
    assert m.quoted["Attention", "5-way 5-shot"] == (46.21, .70)
    small = o.reduced(["RKD-DA"], [3], 5)
    assert (small.name == "omniglot/paper-5epochs" and small.row_names == ["Teacher", "RKD-DA"]
            and small.schedule.milestones == (1., 2., 3., 4.) and "5 of 100" in small.cut)


# --- a user's file

def test_a_file_that_derives_from_ours_has_one_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from dataclasses import replace\nfrom relkd.recipes.digits import *\nmine = replace(digits, name='mine')\n")
    assert recipe(str(path)).name == "mine" and recipe(f"{path}:digits").name == "digits"
    path.write_text(path.read_text() + "other = replace(digits, name='other')\n")
    one_line(lambda: from_file(path), f"{path} defines 2 recipes: name one of them, {path}:mine")
    assert from_file(path, "other").name == recipe(f"{path}:other").name == "other"
    one_line(lambda: from_file(path, "others"), f"unknown recipe of {path} 'others': did you mean 'other'?")
    path.write_text("x = 1\n")
    one_line(lambda: from_file(path), f"{path} defines no recipe")


def test_two_files_of_one_name_are_two_modules_and_no_module_is_hidden(tmp_path):
    import random

    text = ("from dataclasses import replace\nfrom relkd.recipes.digits import digits\n"
            "from relkd.distill import Row, Term\nclass Mine:\n    def __call__(self, s, t): return (s {} t).mean()\n"
            "mine = replace(digits, name='mine', rows=(Row('x', (Term(Mine),)),))\n")
    found = []
    for folder, sign in (("a", "+"), ("b", "-")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "random.py").write_text(text.format(sign))
        found.append(from_file(tmp_path / folder / "random.py"))
    assert digest(described(found[0].rows)) != digest(described(found[1].rows)) and sys.modules["random"] is random
    assert isinstance(found[0], Recipe)


@pytest.mark.parametrize("name", known_recipes())
def test_what_a_recipe_begins_with_is_a_row_of_a_recipe(name):
    """The fault: the second generation of metric/cifar100 named a first one that does not exist."""
    r = recipe(name)
    for of in (r.teacher_weights, *(r.starts or {}).values()):
        if isinstance(of, tuple):
            assert of[1] == "Teacher" or of[1] in [row.name for row in recipe(of[0]).rows], of


def test_rows_that_come_apart_at_their_commas_are_put_together():
    """The fault: 'RKD-D, l2' could not be asked for on the command line."""
    rows = "RKD-D, l2,sp,RKD-A,l2".split(",")
    assert [r.name for r in recipe("text/wordnet").reduced(rows=rows).rows] == ["Cosine", "SP", "RKD-D, l2", "RKD-A, l2"]
    with pytest.raises(ValueError, match="unknown row of text/wordnet ' l3'"):
        recipe("text/wordnet").reduced(rows=["RKD-D", " l3"])
