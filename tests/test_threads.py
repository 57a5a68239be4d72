"""Threads are chosen by the size of the work, recorded, and put back."""
import pytest
import torch
from helpers import tiny, toy
from relkd.records import environment
from relkd.tables.run import Experiment, run
from relkd.train.session import WORTH, Session, chosen_threads


@pytest.fixture
def two(monkeypatch):
    "A process that PyTorch would give two threads, and nobody has said how many."
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def inside(session, products):
    with session.at_work(lambda: products):
        return torch.get_num_threads()


@pytest.mark.parametrize("products, most, threads", [(0, 64, 1), (1e6, 64, 1), (4 * WORTH, 64, 4), (4 * WORTH, 2, 2), (1e12, 64, 64)])
def test_small_work_has_one_thread_and_large_work_as_many_as_there_are(products, most, threads):
    assert chosen_threads(products, most) == threads


def test_what_was_asked_for_comes_first_then_the_environment(two, monkeypatch):
    assert inside(Session(device="cpu"), 1e6) == 1 and inside(Session(device="cpu"), 1e12) == 2
    assert inside(Session(device="cpu", threads=3), 1e6) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert inside(Session(device="cpu"), 1e6) == 2 and inside(Session(device="cpu", threads=1), 1e12) == 1
    assert torch.get_num_threads() == 2


def test_an_error_puts_them_back(two):
    with pytest.raises(KeyError), Session(device="cpu").at_work(lambda: 1):
        raise KeyError
    assert torch.get_num_threads() == 2


def test_a_record_says_how_many(two, tmp_path):
    small = toy(student=tiny, rows=toy().rows[:1]).reduced(epochs=1)
    assert 0 < Experiment(small, Session(tmp_path, "cpu")).products() < 1e6
    assert {r["device"].split("CPU, ")[1] for r in run(small, Session(tmp_path, "cpu"))} == {"1 threads"}
    with Session(threads=2).at_work(None):
        assert environment(torch.device("cpu"))["device"].endswith("CPU, 2 threads")
    assert torch.get_num_threads() == 2
