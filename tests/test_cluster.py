"""A recipe as jobs: the parts make the cells of the whole, bit for bit, however often a job is stopped, killed and queued again."""
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import relkd.cluster as jobs
from data_helpers import one_line
from helpers import few_shot_toy, figures, toy
from relkd.checkpoints import hold
from relkd.cluster import Resources, Wanted, jobs_of, queued, run_here, send, state, status
from relkd.records import load_records
from relkd.tables.experiment import parts
from relkd.tables.run import run
from relkd.train import Session, Stopped

sys.path.append(str(Path(__file__).resolve().parents[1] / ".ci"))
import slurm as nodes  # noqa: E402

# Its loss asks for a stop of its own process, once: what a queue does when the time of a job is over.
MINE = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn
from relkd.data import joined
from relkd.distill import Row, Term
from relkd.tables.recipe import Recipe
from relkd.tasks.classify import Classify
from relkd.train import Schedule

ASKED, CALLS = Path(__file__).with_suffix('.asked'), [0]

def net(outputs, channels):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, outputs))

def images():
    x, y = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    return joined('mine', {'train': (x[:30], y[:30]), 'test': (x[30:], y[30:])}, range(4))

def near(student, teacher):
    CALLS[0] += 1
    time.sleep(float(os.environ.get('RELKD_TEST_SLOW', 0)))
    if CALLS[0] == 7 and not ASKED.exists():
        ASKED.touch()
        os.kill(os.getpid(), signal.SIGUSR2)
    return (student - teacher).square().mean()

plan = Schedule(3, 10, .05, milestones=(2,))
mine = Recipe(name='mine', title='a blink', data=images, task=Classify(), teacher=net, student=net, together=TOGETHER, seeds=(0, 1),
              rows=(Row('Student'), Row('near', (Term(near, 1., '4:input', '4:input'),))), schedule=plan)
"""


@pytest.fixture
def mine(tmp_path):
    "A recipe in a file, and what it gives without any stop."
    def written(together=False, asked=False):
        path = tmp_path / "mine.py"
        path.write_text(MINE.replace("TOGETHER", str(together)))
        path.with_suffix(".asked").touch()
        wanted = Wanted(str(path)) if together else Wanted(str(path), seeds=(0,))
        alone = run(wanted.recipe(), Session(tmp_path / "alone", "cpu"))
        if asked:
            path.with_suffix(".asked").unlink()
        return wanted, wanted.recipe(), tmp_path / "jobs", figures(alone)

    return written


def words(out):
    return {"out": str(out), "device": "cpu"}


# --- parts

@pytest.mark.parametrize("make, change, teachers", [
    (toy, {"together": True}, 1), (toy, {"rows": ()}, 2), (few_shot_toy, {}, 0)])
def test_parts_make_the_cells_of_the_whole(make, change, teachers, tmp_path):
    recipe = make(seeds=(0, 1), **change)
    whole, found = run(recipe, Session(tmp_path / "whole", "cpu")), parts(recipe)
    assert len([g for g, _ in found if not g.seeds]) == teachers and len({g.label for g, _ in found}) == len(found)
    for k, (group, needs) in enumerate(found):
        assert needs is None or needs < k and not found[needs][0].seeds
        run(recipe, Session(tmp_path / "parts", "cpu"), part=k)
    assert figures(load_records(tmp_path / "parts", recipe.name)) == figures(whole)


def test_parts_run_beside_each_other_and_not_beside_the_whole(tmp_path):
    with hold(tmp_path, "seed 0"), hold(tmp_path, "seed 1"):
        one_line(lambda: hold(tmp_path).__enter__(), "another run")
        one_line(lambda: hold(tmp_path, "seed 0").__enter__(), f"another run (process {os.getpid()}) is at work")
    with hold(tmp_path):
        one_line(lambda: hold(tmp_path, "seed 0").__enter__(), "another run")


# --- on this machine

class Forked:
    "A job of submitit's local executor, in processes that need not import anything again."
    def __init__(self, work, logs):
        from submitit.core.utils import DelayedSubmission, JobPaths

        self.job_id, self.logs, delayed = str(os.getpid()), Path(logs), DelayedSubmission(work)
        self.logs.mkdir(parents=True, exist_ok=True)
        delayed.set_timeout(60, 10)
        delayed.dump(JobPaths(logs, self.job_id).submitted_pickle)
        while self.once() == 144:                            # submitit's sign: once more
            pass

    def once(self):
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            log = os.open(self.logs / f"{self.job_id}_0_log.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": self.job_id}
            from submitit.core.submission import process_job

            process_job(self.logs)
            code = 0
        except SystemExit as left:
            code = left.code
        except BaseException:
            code = 1
        sys.stdout.flush()
        os._exit(code)

    def done(self):
        return True


def test_a_stopped_job_is_queued_again_and_gives_the_same(mine, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(jobs, "_start", lambda work, logs, gpus, hours: Forked(work, logs))
    wanted, recipe, out, expected = mine(together=True, asked=True)
    said = []
    run_here(wanted, Resources(), words(out), say=said.append)
    assert said == ["teacher 0: done", "seed 0: done", "seed 1: done"] and figures(load_records(out, "mine")) == expected
    [job, *_] = jobs_of(out, recipe)
    log = (Path(job["folder"]) / f"{job['id']}_0_log.out").read_text()
    assert log.count("relkd: stopped at a checkpoint (SIGUSR2)") == 1, log


def test_a_part_that_fails_is_named_and_what_waits_for_it_is_not_run(mine, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setattr(jobs, "_start", lambda work, logs, gpus, hours: Forked(work, logs))
    wanted, recipe, out, _ = mine(together=True)
    monkeypatch.setattr(jobs.Work, "__call__", lambda self: 1 / 0)
    said = []
    message = one_line(lambda: run_here(wanted, Resources(), words(out), say=said.append), "3 of 3 jobs of mine did not end well")
    assert "relkd status" in message
    assert said[0].startswith("teacher 0: failed ZeroDivisionError: division by zero; ") and said[1] == (
        "seed 0: not run, because its teacher failed")
    assert status(recipe, out)[-1] == "1 failed"
    work = jobs.Work(wanted, 0, words(out), "an older stamp")
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "_joined", lambda: 0)
    one_line(work, "mine was changed after this job was sent off")


def test_the_command_runs_jobs_here_and_draws_the_table(mine, typed, relkd_env):
    """In earnest, by submitit's local executor."""
    pytest.importorskip("submitit")
    wanted, recipe, out, expected = mine()
    code, said, wrong = typed("run", wanted.name, "--seeds", "0", "--on", "local", "--device", "cpu", "--out", out)
    assert code == 0 and said.startswith("seed 0: done\n") and "Teacher" in said, said + wrong
    assert figures(load_records(out, "mine")) == expected
    code, said, _ = typed("status", wanted.name, "--seeds", "0", "--out", out)
    assert code == 0 and said.splitlines()[0] == f"mine: 3 of 3 runs have a record in {out}/records/mine" and said.endswith("1 done\n")


def test_where_a_job_stands(tmp_path):
    entry = {"id": "7", "on": "slurm", "host": "", "part": "seed 0", "recipe": "", "folder": str(tmp_path)}
    assert state(entry, {"7": ("PENDING", "Priority", "")}) == ("waits", "Priority")
    (tmp_path / "7_0_log.out").write_bytes(b"mine seed 0:  33%|###   | 1/3\rmine seed 0:  66%|######  | 2/3\r")
    assert state(entry, {"7": ("RUNNING", "None", "n1")}) == ("runs", "on n1: mine seed 0:  66%|######  | 2/3")
    assert state(entry, {})[0] == "lost" and "66%" in state(entry, {})[1]
    assert state(entry | {"on": "local", "host": socket.gethostname(), "id": str(os.getpid())}, {})[0] == "runs"
    (tmp_path / "7_0_result.pkl").write_bytes(pickle.dumps(("error", "Traceback\nValueError: no\n")))
    assert state(entry, {}) == ("failed", f"ValueError: no; {tmp_path}/7_0_log.out")


def test_what_cannot_be_is_refused_in_one_line(mine, monkeypatch):
    wanted, recipe, out, _ = mine()
    assert status(recipe, out)[1:] == ["no jobs were sent off"]
    one_line(lambda: run_here(wanted, Resources(gpus=9), words(out)), "--gpus 9 were asked for, and this PyTorch sees 0")
    monkeypatch.setenv("PATH", "/nowhere")
    one_line(lambda: send(wanted, Resources(), words(out)), "--on slurm needs Slurm's sbatch, which is not on this machine")
    monkeypatch.setitem(sys.modules, "submitit", None)
    one_line(lambda: run_here(wanted, Resources(), words(out)), 'jobs need submitit: pip install "relkd[slurm]"')


def test_a_stop_reaches_every_job(mine):
    class Asked:
        why, count = "budget", 0

        def due(self):
            self.count += 1
            return self.count > 1

    pytest.importorskip("submitit")
    wanted, _, out, _ = mine()
    ended = []
    here = type("Job", (), {"job_id": "0", "done": lambda self: True})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(jobs, "_start", lambda *_: here())
        m.setattr(jobs._Here, "look", lambda self: None)
        m.setattr(os, "kill", lambda *a: ended.append(a))
        with pytest.raises(Stopped, match="budget"):
            run_here(wanted, Resources(), words(out), Asked())
    assert ended == [(0, signal.SIGTERM)]


# --- on a Slurm with two virtual nodes

@pytest.fixture(scope="module")
def slurm(tmp_path_factory, request):
    pytest.importorskip("submitit")
    if "slow" not in request.config.getoption("--flags"):
        pytest.skip("jobs on two nodes of Slurm take a minute: --flags slow")
    if why := nodes.lacking():
        pytest.skip(why)
    with nodes.Slurm(tmp_path_factory.mktemp("slurm")) as up:
        old = dict(os.environ)
        os.environ.update(up.env)
        yield up
        os.environ.clear()
        os.environ.update(old)


def until(true, seconds=120):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "it takes too long"
        time.sleep(.1)


def states(recipe, out):
    return {j["part"]: state(j, queued())[0] for j in jobs_of(out, recipe)}


def log_of(job):
    path = Path(job["folder"]) / f"{job['id']}_0_log.out"
    return path.read_text() if path.exists() else ""


def at_work(recipe, out, *parts):
    "Have the students of these jobs begun?"
    return all("students:" in log_of(j) for j in jobs_of(out, recipe) if j["part"] in parts)


def test_a_grid_that_has_to_make_room_gives_the_same(slurm, mine, monkeypatch, typed):
    """Its students wait for their teacher, are thrown out by a job of a better partition, and go on."""
    monkeypatch.setenv("RELKD_TEST_SLOW", ".4")
    wanted, recipe, out, expected = mine(together=True)
    asked = Resources("low", hours=1)
    sent = send(wanted, asked, words(out))
    assert [j["part"] for j in sent] == ["teacher 0", "seed 0", "seed 1"] and send(wanted, asked, words(out)) == []
    assert states(recipe, out)["seed 1"] == "waits"
    until(lambda: states(recipe, out)["teacher 0"] == "done")
    code, table, _ = typed("table", wanted.name, "--out", out)
    assert code == 0 and table.splitlines()[-1].startswith("Teacher")
    until(lambda: at_work(recipe, out, "seed 0", "seed 1"))
    slurm.call("sbatch", "-p", "high", "-N", "2", "--wrap", "sleep 2", "-o", "/dev/null")
    until(lambda: set(states(recipe, out).values()) == {"done"})
    assert figures(load_records(out, "mine")) == expected
    for job in sent[1:]:
        log = log_of(job)
        assert "relkd: stopped at a checkpoint (SIGTERM)" in log and log.count("Starting with JobEnvironment") == 2, log
    code, said, _ = typed("status", wanted.name, "--out", out)
    assert code == 0 and said.startswith("mine: 5 of 5 runs have a record") and said.endswith("3 done\n"), said


def test_a_job_at_the_end_of_its_time_is_queued_again(slurm, mine):
    wanted, recipe, out, expected = mine(asked=True)
    send(wanted, Resources("low", hours=1), words(out))
    until(lambda: states(recipe, out) == {"seed 0": "done"})
    assert figures(load_records(out, "mine")) == expected
    assert "relkd: stopped at a checkpoint (SIGUSR2)" in log_of(*jobs_of(out, recipe))


def test_a_killed_job_goes_on_when_it_is_sent_off_again(slurm, mine, monkeypatch):
    monkeypatch.setenv("RELKD_TEST_SLOW", ".4")
    wanted, recipe, out, expected = mine()
    asked = Resources("low", hours=1)
    send(wanted, asked, words(out))
    until(lambda: at_work(recipe, out, "seed 0"))
    os.kill(int((out / ".runs" / "mine" / ".lock-seed0").read_text()), signal.SIGKILL)
    until(lambda: states(recipe, out) == {"seed 0": "lost"})
    assert "ended without a result" in "".join(status(recipe, out))
    assert [j["part"] for j in send(wanted, asked, words(out))] == ["seed 0"]
    until(lambda: states(recipe, out) == {"seed 0": "done"})
    assert figures(load_records(out, "mine")) == expected


def nearly(records, expected, processes):
    assert len(records) == 3 and {r["processes"] for r in records} == {processes}
    for r in records:
        _, epochs, _, run = expected[r["row"], "{}", 0]
        assert r["run"] == run and [e["loss"] for e in r["epochs"]] == pytest.approx([e["loss"] for e in epochs], rel=1e-3)


def test_a_job_on_two_nodes_trains_as_one_process(slurm, mine, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")                   # the two nodes have no names of their own
    wanted, recipe, out, expected = mine()
    send(wanted, Resources("low", hours=1, nodes=2), words(out))
    until(lambda: states(recipe, out) == {"seed 0": "done"})
    nearly(load_records(out, "mine"), expected, 2)


# --- several machines without a queue: an agent of torchrun on each

def test_two_agents_of_torchrun_train_as_one_process(mine, flags, relkd_env):
    if "slow" not in flags:
        pytest.skip("two agents take a while: --flags slow")
    wanted, _, out, expected = mine()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        end = f"127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", end, "--rdzv-id", "relkd", "-m", "relkd.cli", "run", wanted.name, "--seeds", "0", "--device", "cpu",
               "--out", out]
    agents = [subprocess.Popen(command, env=relkd_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [a.communicate(timeout=120)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], said
    nearly(load_records(out, "mine"), expected, 2)
