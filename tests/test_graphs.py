"""Steps that are recorded and replayed are the steps themselves: by a tape, which is wrong wherever a CUDA graph would be."""
import warnings

import pytest
import torch

from helpers import After, few_digits, tiny
from relkd.data import Batches
from relkd.distill import PAPER_ROWS, Row, Stage, Term
from relkd.train import Learner, Saver, Schedule, Session, Stopped, fit
from relkd.train.graphs import Recorded, Tape

ROWS = [PAPER_ROWS[0], Row("KD", (Term("KD", 1.),)), Row("SP then VID", (Term("VID", .1, "fc:input", "fc:input"),),
                                                         before=(Stage((Term("SP", 9., "fc:input", "fc:input"),), 2),))]


def fused(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=.9, fused=True)


def network(seed):
    torch.manual_seed(seed)
    return tiny(10, 1)


def trained(graphs, rows=ROWS, epochs=3, batch=16, **session):
    data = few_digits()
    learners = [Learner(network(k), r, Schedule(epochs, batch, .05, milestones=(1,), optimiser=fused), seed=k)
                for k, r in enumerate(rows)]
    saver = session.pop("saver", None)
    fit(learners, Batches(data, batch, 1), epochs, network(9), Session(device="cpu", precision="32", graphs=graphs, **session), data,
        saver=saver)
    return learners


def equal(one, other):
    return all(a.epochs == b.epochs and all(x.equal(y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
               for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def plain():
    return trained("off")


def test_replayed_is_the_same_bit_for_bit_stages_included(plain):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(trained("on"), plain)


def test_stopped_and_continued_is_the_same_with_and_without(plain, tmp_path):
    for first, second in (("on", "on"), ("on", "off"), ("off", "on")):
        path = tmp_path / f"{first}{second}"
        with pytest.raises(Stopped):
            trained(first, stop=After(7), saver=Saver(path, "d"))
        assert equal(trained(second, saver=Saver(path, "d")), plain)


def test_what_asks_for_a_value_is_done_plainly_and_its_neighbour_sees_the_right_teacher():
    rows = [PAPER_ROWS[2], ROWS[1]]
    with pytest.warns(UserWarning, match="RKD.*: not replayed but done step by step, since a value is asked for"):
        on = trained("on", rows, 2)
    assert equal(on, trained("off", rows, 2))


def test_an_optimiser_that_keeps_its_rate_as_a_number_is_not_recorded(monkeypatch):
    """A recorded number would be that of the recording for ever, and one step's check could not see it."""
    monkeypatch.setitem(globals(), "fused", lambda parameters, lr: torch.optim.Adam(parameters, lr))
    with pytest.warns(UserWarning, match="KD, seed 0: not replayed .* its optimiser is not fused: the rate is a number"):
        on = trained("on", [ROWS[1]], 2)
    assert equal(on, trained("off", [ROWS[1]], 2))


class Counts(torch.nn.Module):
    """A loss that Python changes from call to call."""
    calls = 0

    def forward(self, s, t):
        self.calls += 1
        return (s - t).square().mean() * self.calls


def test_what_python_changes_is_found_by_the_check():
    with pytest.warns(UserWarning, match="counts, seed 0: not replayed .* it comes to other numbers"):
        trained("on", [Row("counts", (Term(Counts, 1.),))], 1)


def test_a_tape_repeats_numbers_and_reads_memory():
    w, rate = torch.ones(2), torch.tensor(.5)
    with Tape() as tape:
        w.sub_(rate * .5 * w)
    rate.fill_(1.)
    tape.replay()
    assert w.tolist() == [.375, .375] and not tape.waits and len(tape) == 3
    with Tape() as tape:
        assert w[0].item() == .375
    assert tape.waits == ["aten::_local_scalar_dense"]


def test_work_that_cannot_be_recorded_is_done():
    def work():
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("not in a recording\nsecond line")
        return w.add_(1)

    w = torch.zeros(1)
    recorded = Recorded("odd", work, w.device, lambda: [w], warm=1)
    recorded()
    with pytest.warns(UserWarning, match="^odd: not replayed but done step by step, since not in a recording$"):
        recorded()
    recorded()
    assert w.item() == 3


def test_the_choice_is_checked_at_once():
    with pytest.raises(ValueError, match="graphs is 'auto', 'on' or 'off'; got 'yes'"):
        Session(graphs="yes")
    session = Session(device="cpu", graphs="on")

    class Two:
        world_size, device = 2, torch.device("cpu")

    with pytest.raises(ValueError, match="recorded in one process, not in 2: use 'off'"):
        session.graphed(Two)
    assert not Session(device="cpu").graphed(session.fabric()) and session.graphed(session.fabric())
