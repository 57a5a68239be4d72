"""Runs that are killed: at any moment, before every operation on a file, and beside each other."""
import atexit
import os
import shutil
import signal
import tempfile
import time
from functools import cache
from pathlib import Path

from campaign.tally import finish, in_child, patched, patience, start
from campaign.tiny import KINDS, expected, left_over, life, result
from relkd.train import Session
from relkd.tables.run import run


@cache
def undisturbed(kind):
    recipe, out = KINDS[kind](), Path(tempfile.mkdtemp(prefix="campaign"))
    run(recipe, Session(str(out), "cpu"))                     # here, so that no child has to import or load anything
    again = Path(tempfile.mkdtemp(prefix="campaign"))
    begun = time.perf_counter()
    outcome, _ = in_child(lambda: len(run(recipe, Session(str(again), "cpu"))), 300)
    took = time.perf_counter() - begun
    assert outcome is None and result(recipe, again) == result(recipe, out), outcome
    shutil.rmtree(again)
    atexit.register(shutil.rmtree, out, True)
    return recipe, result(recipe, out), took, out


def whole(kind, at):
    """A recipe, what it gives undisturbed, and how long that took; a copy of all that it wrote lies in `at`/whole."""
    recipe, want, took, out = undisturbed(kind)
    shutil.copytree(out, at / "whole")
    return recipe, want, took


def _one_life(recipe, out, rng, seconds):
    """Start it, and end it after a while: (signal or None, was the end as expected?)."""
    child, read = start(lambda: life(recipe, out, parts=rng.choice([None, 20_000])))
    others = [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)]
    number, twice = rng.choice([(signal.SIGKILL, False)] * 6 + others)
    time.sleep(rng.uniform(.02, seconds))
    if os.waitpid(child, os.WNOHANG)[0]:
        os.close(read)
        return None, True
    os.kill(child, number)
    if twice:
        time.sleep(rng.uniform(0, .05))
        os.kill(child, number)
    deadline = time.time() + patience(60)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.time() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return number, False
        time.sleep(.005)
    os.close(read)
    return number, os.waitstatus_to_exitcode(ended[1]) in expected(number, twice) | {0}


def signals(tally, at, rng, kind):
    """Sequences of lives of one run until it is finished; then it has to be as if it had never been disturbed."""
    recipe, want, took = whole(kind, at)
    lives = []
    while tally.going():
        out = at / f"out{len(lives)}"
        count, wrong = 0, ""
        while tally.going() and count < 60:
            number, fine = _one_life(recipe, out, rng, 1.2 * took)
            if number is None:
                break
            count += 1
            wrong = wrong or ("" if fine else f"after {signal.Signals(number).name} it did not leave as it should")
        outcome, _ = in_child(lambda: life(recipe, out), 120)
        wrong = wrong or outcome or ("" if result(recipe, out) == want else "another result than undisturbed")
        wrong = wrong or (f"left behind: {left}" if (left := left_over(out)) else "")
        for k in range(count):
            tally.add(wrong if wrong and k == 0 else "survived", f"{kind}, sequence {len(lives)}")
        lives.append(count)
    tally.notes |= {"sequences": len(lives), "longest": max(lives, default=0)}


def _operations(fatal, count):
    """Before the operation numbered `fatal` the process kills itself; `count` holds how many there were."""
    def before(real):
        def call(*a, **k):
            count[0] += 1
            if count[0] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)
        return call

    of = ((os, "replace"), (os, "fsync"), (tempfile, "mkstemp"), (Path, "unlink"))
    return patched(*((o, n, before(getattr(o, n))) for o, n in of))


def points(tally, at, rng, kind):
    """A kill before each renaming, writing, making and removing of a file, then one start more."""
    recipe, want, _ = whole(kind, at)

    def counted(out, fatal=0):
        count = [0]
        with _operations(fatal, count):
            life(recipe, out, every=.2)
        return count[0]

    total = in_child(lambda: counted(at / "counted"))[1]
    places = list(range(1, total + 1))
    rng.shuffle(places)
    for n in places:
        if not tally.going():
            break
        out = at / f"at{n}"
        in_child(lambda: counted(out, n))
        outcome, _ = in_child(lambda: life(recipe, out))
        same = outcome is None and result(recipe, out) == want
        left = same and left_over(out)
        what = f"{kind}, operation {n} of {total}"
        wrong = outcome or ("" if same else "another result") or (f"left behind: {left}" if left else "")
        tally.add(wrong or "survived", what)
    tally.notes |= {"operations": total}


def together(tally, at, rng, kind):
    """Two starts of one recipe in one folder, one of them sometimes killed; a third finds everything right."""
    recipe, want, took = whole(kind, at)
    k = 0
    while tally.going():
        out, k = at / f"two{k}", k + 1
        first = start(lambda: life(recipe, out))
        time.sleep(rng.choice([0, 0, rng.uniform(0, took)]))
        second = start(lambda: life(recipe, out))
        if rng.random() < .4:
            time.sleep(rng.uniform(0, took))
            os.kill(first[0], signal.SIGKILL)
        ends = [finish(*both, 120)[0] for both in (first, second)]
        strange = [e for e in ends if e not in (None, "said", "ended by SIGKILL")]
        outcome, _ = in_child(lambda: life(recipe, out))
        right = outcome is None and result(recipe, out) == want
        wrong = str(strange) if strange else outcome or ("" if right else "another result")
        tally.add(wrong or "survived", f"{kind}, pair {k}")
