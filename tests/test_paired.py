"""Tables from records: paired differences by hand and by SciPy, the committed tables byte for byte, and what does not belong together."""
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import one_line
from helpers import few_shot_toy, gen, toy
from relkd.catalogue import known_recipes
from relkd.data import load
from relkd.distill import Row
from relkd.plots import distances_figure, episode_figure, plane
from relkd.ground import digest
from relkd.records import load_records, make_record, write_record
from relkd.tables.paired import accuracies, agreement, as_text, compare, csv_of, draw, episodes_needed, summary, table
from relkd.tables.recipe import recipe
from relkd.tasks.fewshot import interval

FIGURES = Path(__file__).resolve().parents[1] / "figures"
COMMITTED = ["digits", "digits/losses", "digits/balanced", "cifar100/cpu", "omniglot/cpu", "cifar_fs/cpu"]
COMMITTED += [n for n in known_recipes() if n not in COMMITTED and (FIGURES / f"{n.replace('/', '-')}.csv").exists()]
UNFINISHED = ["omniglot/paper"]  # some of its seeds are still to be run
COST = dict(seconds=1., trained_beside=1, images_per_second=1., processes=1, weights="w", teacher_weights=None)


def records_of(values, recipe="toy", protocol=None):
    return [make_record({"recipe": recipe, "row": row, "variant": {}, "seed": s}, digest({"row": row, "seed": s, **(protocol or {})}),
                        {"row": row, "seed": s, **(protocol or {})}, "top-1", {"top-1": {"accuracy": a}},
                        [{"epoch": 1, "accuracy": a + 1}, {"epoch": 2, "accuracy": a}], torch.device("cpu"), **COST)
            for row, v in values.items() for s, a in enumerate(v)]


def episodes(row, seed, hits, queries=75, trial=0):
    tests = {"5-way 1-shot": {"hits": " ".join(map(str, hits)), "queries": queries, "episodes": len(hits),
                              "accuracy": 100 * np.mean(hits) / queries, "interval": 1.}}
    protocol = {"tests": [{"way": 5, "shot": 1, "seed": trial}]}
    return make_record({"recipe": "few-shot-toy", "row": row, "variant": {"shot": 1}, "seed": seed}, digest(protocol),
                       protocol, "5-way 1-shot", tests,
                       [{"epoch": 1, "loss": 1., "validation": 20.}], torch.device("cpu"), **COST)


# --- the committed tables

@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_table_is_that_of_the_committed_records_byte_for_byte(name):
    r = recipe(name)
    records = load_records(FIGURES, name)
    teachers = {0} if r.together else set(r.seeds)
    there, wanted = {(x["row"], x["seed"]) for x in records}, {(row, s) for row in r.row_names
                                                               for s in (teachers if row == "Teacher" else r.seeds)}
    assert there == wanted or name in UNFINISHED and there < wanted
    assert csv_of(table(records, r), r) == (FIGURES / f"{name.replace('/', '-')}.csv").read_bytes(), f"run `relkd table {name}`"
    assert len({x["protocol"]["precision"] for x in records}) == 1


def test_the_committed_digits_are_the_digits():
    assert {r["protocol"]["data"] for r in load_records(FIGURES, "digits")} == {load("digits").fingerprint}


# --- by hand

def test_a_table_against_scipy():
    from scipy.stats import ttest_rel

    a, b = [90., 92, 91, 94, 89], [92., 93, 93, 95, 92]
    r = toy(quoted={"HKD": 93.})
    frame = table(records_of({"Student": a, "HKD": b}), r)
    ci, row = ttest_rel(b, a).confidence_interval(.95), frame.loc[("top-1", "HKD")]
    assert (row[["low", "high"]].tolist() == pytest.approx([ci.low, ci.high])
            and (row["last"], row["best"], row["paper"]) == pytest.approx((93, 94, 93)))
    assert "+1.80  [+0.76, +2.84]" in as_text(frame)
    one = as_text(table(records_of({"Student": [90.], "HKD": [91.]}), r))
    assert "+1.00" in one and "nan" not in one and "needed" not in one


def test_paired_differences_of_episodes_by_hand():
    a = [episodes("A", 0, [60, 75, 45, 30]), episodes("A", 1, [75, 75, 60, 30])]
    b = [episodes("B", 0, [45, 60, 45, 30]), episodes("B", 1, [60, 75, 45, 15]), episodes("B", 2, [1, 2, 3, 4])]
    c = compare(a + b, "A", "B", "5-way 1-shot")
    d = np.array([[20, 20, 0, 0], [20, 0, 20, 20]])                                  # points
    assert c["seeds"] == 2 and c["difference"] == pytest.approx(12.5)
    assert c["over_episodes"] == pytest.approx(1.96 * d.mean(0).std(ddof=1) / 2) and c["deviation"] == pytest.approx(d.mean(0).std(ddof=1))
    assert (c["over_seeds"] == pytest.approx(12.7062 * np.std([10, 15], ddof=1) / 2**.5, rel=1e-4)
            and c["needed"] == math.ceil((2.8 * c["deviation"] / 12.5)**2))
    assert compare(a, "A", "B", "5-way 1-shot") == {} == compare(a + b, "A", "B", "20-way 1-shot")
    assert accuracies(a[0], "5-way 1-shot").tolist() == [80, 100, 60, 40]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=9))
def test_a_difference_does_not_depend_on_the_order_of_records_and_turns_its_sign(pairs):
    a, b = zip(*pairs)
    records = records_of({"A": a, "B": b})
    there, back = compare(records[::-1], "A", "B", "top-1"), compare(records, "B", "A", "top-1")
    assert (there["difference"] == pytest.approx(-back["difference"]) == pytest.approx(np.mean(a) - np.mean(b), abs=1e-9)
            and there["over_seeds"] == pytest.approx(back["over_seeds"]))


def test_the_number_of_episodes_that_is_needed_is_enough():
    rng, n = np.random.default_rng(0), episodes_needed(1., 8.)
    assert n == 502 and episodes_needed(-1., 8.) == n and episodes_needed(0., 8.) == math.inf
    excluded = sum((lambda m: m[0] - m[1] > 0)(interval(rng.normal(1., 8., n))) for _ in range(400))
    assert .74 < excluded / 400 < .86, "80 % of all experiments"
    assert episodes_needed(1., 8., power=0.) == 246 == math.ceil((1.96 * 8)**2), "with 0, half of them"


def test_two_runs_of_a_recipe_agree_or_not():
    r = toy()
    mine, alike, other = (records_of({"HKD": v}) for v in ([90., 91, 92], [90.5, 91, 91.5], [80., 81, 82]))
    assert [x[-1] for x in agreement(mine, alike, r)] == [True] and [x[-1] for x in agreement(mine, other, r)] == [False]
    assert agreement(mine, mine, r)[0][2:] == (91., 91., pytest.approx(agreement(mine, mine, r)[0][4]), True)


# --- a validation is not a result

def test_a_few_shot_table_shows_tests_and_calls_validation_what_it_is(tmp_path):
    rows = [episodes(row, s, hits) for row in ("Teacher", "RKD-D") for s, hits in ((0, [60, 75]), (1, [75, 60]))]
    r = few_shot_toy(quoted={("RKD-D", "5-way 1-shot"): (49.66, .84)})
    frame = table(rows, r)
    line = frame.loc[("5-way 1-shot", "RKD-D")]
    assert ((line["last"], line["validation"], line["paper"], line["paper_over_episodes"])
            == pytest.approx((90., 20., 49.66, .84)) and math.isnan(line["best"]))
    text = as_text(frame)
    assert "20.00" not in text and "best" not in text and "nan" not in text and "49.66 ± 0.84" in text
    for x in rows:
        write_record(tmp_path, x)
    assert list(draw(r, tmp_path).index) == [("5-way 1-shot", "Teacher"), ("5-way 1-shot", "RKD-D")]
    header, *lines = csv.reader((tmp_path / "few-shot-toy.csv").open())
    assert (header[:4] == ["test", "row", "seeds", "accuracy"] and lines[1][header.index("accuracy")] == "90.0"
            and lines[1][header.index("validation")] == "20.0")
    assert (tmp_path / "few-shot-toy.png").stat().st_size > 5000


def test_what_was_cut_down_stands_in_table_and_figure(tmp_path):
    for x in records_of({"Student": [90.], "HKD": [91.]}):
        write_record(tmp_path, x)
    r = toy(cut="3 of 5 rows")
    draw(r, tmp_path)
    assert {line["cut_down"] for line in csv.DictReader((tmp_path / "toy.csv").open())} == {"3 of 5 rows"}
    figure = summary(r, tmp_path)[1]
    assert "cut down: 3 of 5 rows" in " ".join(t.get_text() for t in figure.findobj(lambda t: hasattr(t, "get_text")))


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    """The fault: matplotlib took what stands between two of them for a formula, and said so in four lines."""
    for x in records_of({"$\\frac$": [90., 91.], "a$_b$": [91., 92.]}):
        write_record(tmp_path, x)
    r = toy(rows=(Row("$\\frac$"), Row("a$_b$")), title="5 $ and $\\frac$", baseline="$\\frac$")
    assert list(draw(r, tmp_path).index.get_level_values(1)) == ["$\\frac$", "a$_b$"]


# --- what does not belong together

def test_records_of_two_protocols_are_not_one_table(tmp_path):
    for x in (records_of({"Student": [90.]})
              + [x for x in records_of({"Student": [90., 91.]}, protocol={"network": "another"}) if x["seed"] == 1]):
        write_record(tmp_path, x)
    one_line(lambda: summary(toy(), tmp_path), "records of row 'Student' come from different protocols (seeds [0] / "
                                               "[1]): run the recipe to its end, or remove the old ones")


def test_records_of_two_precisions_are_not_one_table(tmp_path):
    a, b = (records_of({"Student": [90., 91.]}, protocol={"precision": p}) for p in ("32-true", "bf16-mixed"))
    for x in (a[0], b[1]):
        write_record(tmp_path, x)
    one_line(lambda: summary(toy(), tmp_path), "come from different protocols")


def test_students_of_two_teachers_under_one_name_are_not_one_table(tmp_path):
    for x, weights in zip(records_of({"Student": [90.], "HKD": [91.]}, protocol={"stream": 0}), ("aa", "bb")):
        write_record(tmp_path, {**x, "teacher_weights": weights})
    one_line(lambda: summary(toy(), tmp_path), "were taught by 2 teachers with other weights under one name")


def test_different_test_episodes_are_not_paired():
    for other in (episodes("B", 0, [1, 2], trial=5), episodes("B", 0, [1, 2, 3]), episodes("B", 0, [1, 2], queries=100)):
        one_line(lambda other=other: compare([episodes("A", 0, [1, 2]), other], "A", "B", "5-way 1-shot"),
                 "records of A and B were tested on different 5-way 1-shot episodes")


# --- pictures

def test_the_plane_is_a_projection_and_is_only_turned():
    z = torch.randn(20, 6, generator=gen(), dtype=torch.float64) * torch.tensor([5., 3, 1, 1, .1, .1])
    xy = plane(z)
    assert (torch.allclose(xy.var(0), torch.linalg.eigvalsh(z.T.cov()).flip(0)[:2])
            and torch.allclose(xy.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12))
    R = torch.tensor([[0., 1], [1, 0]], dtype=torch.float64)
    assert torch.allclose(plane(z, like=xy @ R), xy @ R, atol=1e-9)
    clouds = {"a": z.view(4, 5, 6), "b": z.view(4, 5, 6) * 3}
    assert len(episode_figure(clouds, 2).axes) == 2 and "correlation 1.00" in distances_figure(clouds).axes[1].get_title()
