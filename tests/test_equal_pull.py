"""A weight that is measured: once, before the first step, on the first batches; then it is part of the state and of the record."""
from dataclasses import replace

import pytest
import torch

import relkd.train.loop as loop
from data_helpers import one_line
from helpers import After, Tiny, few_digits, few_shot_toy, figures, gen, toy
from relkd.data import Batches
from relkd.distill import EqualPull, Look, Objective, Row, Stage, Term, measure, starting_weights
from relkd.records import load_records
from relkd.tables.run import run
from relkd.train import Session, Stopped

PULLS = Row("balanced", (Term("RKDDistance", EqualPull(.5)), Term("FitNet", EqualPull(batches=2), "conv", "conv"),
                         Term("KD", 2., "logits", "logits")))


def net(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny(10)


def batches(n):
    return [b for _, b in zip(range(n), Batches(few_digits(), 25, 0).epoch(0))]


def test_it_is_the_starting_weight_of_the_first_batches():
    o, student, teacher = Objective(PULLS), net(0), net(1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = measure(o, student, teacher, batches(4), seed=3)
    [half] = starting_weights(PULLS.terms[:1], student, teacher, batches(4), share=.5, seed=3)
    [whole] = starting_weights(PULLS.terms[1:2], student, teacher, batches(2), seed=3)
    assert [o.weight(k) for k in range(3)] == pytest.approx([half.weight, whole.weight, 2.], rel=1e-6)
    assert list(found) == ["(pull 0.5) RKDDistance() on fc:input", "(pull 1) FitNet() on conv"]
    assert all(v.equal(before[k]) for k, v in student.state_dict().items())


def test_the_objective_multiplies_by_it_and_hands_it_on_with_its_state():
    o, plain = Objective(PULLS), Objective(replace(PULLS, terms=tuple(replace(t, weight=w) for t, w in zip(PULLS.terms, (3., 5., 2.)))))
    g = gen(0)
    s, t = ({"logits": torch.randn(6, 10, generator=g), "fc:input": torch.randn(6, 8, generator=g),
             "conv": torch.randn(6, 4, 3, 3, generator=g)} for _ in range(2))
    for one in (o, plain):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            one.build(s, t)
    y = torch.arange(6)
    one_line(lambda: o(s, Look(t), y), "a weight of row 'balanced' is not measured: call measure() first")
    o.set_weight(0, 3.), o.set_weight(1, 5.)
    assert o(s, Look(t), y).equal(plain(s, Look(t), y))
    other = Objective(PULLS).build(s, t)
    other.set_weight(0, 1.), other.set_weight(1, 1.)
    assert other.weight(0) == 1.
    other.load_state_dict(o.state_dict())
    assert other.weight(0) == 3. and not [k for k in plain.state_dict() if "weight_" in k]


def test_a_run_records_what_it_measured_and_says_it(tmp_path, capsys):
    recipe = toy(rows=(Row("Student"), PULLS))
    records = {r["row"]: r for r in run(recipe, Session(tmp_path, "cpu", progress=True))}
    weighed = records["balanced"]["measured"]
    assert list(weighed) == ["(pull 0.5) RKDDistance() on fc:input", "(pull 1) FitNet() on conv"] and "measured" not in records["Student"]
    said = [line for line in capsys.readouterr().out.splitlines() if " weighs " in line]
    assert said == [f"balanced, seed 0: {term} weighs {w:.4g}" for term, w in weighed.items()]
    assert records["balanced"]["protocol"]["row"]["terms"][0]["weight"] == {"share": .5, "batches": 4}
    [record] = [r for r in load_records(tmp_path, "toy") if r["row"] == "balanced"]
    assert record["measured"] == weighed


def test_a_run_that_goes_on_takes_the_recorded_weights(tmp_path, monkeypatch):
    recipe = toy(rows=(Row("Student"), PULLS))
    whole = run(recipe, Session(tmp_path / "whole", "cpu"))
    with pytest.raises(Stopped):
        run(recipe, Session(tmp_path / "parts", "cpu", stop=After(16)))              # the teacher takes 12 steps
    monkeypatch.setattr(loop, "measure", lambda o, *_: [o.set_weight(k, 1e9) for k in o.measured])
    again = run(recipe, Session(tmp_path / "parts", "cpu"))
    assert figures(again) == figures(whole)
    assert [r.get("measured") for r in again] == [r.get("measured") for r in whole]


def test_on_episodes_the_tasks_own_loss_is_what_it_is_measured_by(tmp_path):
    recipe = few_shot_toy(rows=(Row("RKD-D", (Term("RKDDistance", EqualPull()),)),), vary={"shot": (1,)})
    [record] = [r for r in run(recipe, Session(tmp_path, "cpu")) if r["row"] == "RKD-D"]
    assert 0 < record["measured"]["(pull 1) RKDDistance() on fc:input"] < 1e6


def test_what_cannot_be_measured_is_refused():
    first = Row("hints first", before=(Stage((Term("FitNet", EqualPull(), "conv", "conv"),), 2),))
    one_line(lambda: Objective(first), "row 'hints first' asks for an equal pull in a stage before the main one")
    flat = Row("flat", (Term(lambda s, t: 0 * s.sum(), EqualPull()),))
    one_line(lambda: measure(Objective(flat), net(0), net(1), batches(1)), "of row 'flat' has no gradient: no weight makes it pull")
