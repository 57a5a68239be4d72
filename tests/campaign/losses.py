"""Losses on anything, against formulas; at every scale; on what is not a number."""
import fuzz
from campaign.tally import judged
from helpers import CASES


def anything(tally, at, rng):
    """Random shapes, types, contents, layouts and scales."""
    for case in fuzz.cases(rng.randrange(10**9)):
        if not tally.going():
            break
        outcome, wrong = judged(lambda: fuzz.complaint(case))
        small = outcome == "said" and case["n"] < 4           # below what a loss is defined for
        tally.add("said" if small else outcome or wrong or "survived", str(case))


def scales(tally, at, rng):
    """What does not depend on scale is right from 1e-30 to 1e30, and nothing is silent above it."""
    powers = range(-30, 31, 5)
    todo = [("right", name, a, b) for name in fuzz.SCALE_FREE for a in powers for b in powers]
    todo += [("silent", name, power, None) for name in CASES for power in (19, 20, 25, 30, 36)]
    rng.shuffle(todo)
    for kind, name, a, b in todo:
        if not tally.going():
            break
        if kind == "silent":
            outcome, wrong = judged(lambda: fuzz.silent(name, a))
        else:
            outcome, off = judged(lambda: fuzz.at_scale(name, a, b))
            fine = fuzz.tolerance(name)
            wrong = "" if outcome or off[0] <= fine[0] and off[1] <= fine[1] else f"off by {off[0]:.1e}, {off[1]:.1e}"
        where = f"1e{a}" + (f", teacher at 1e{b}" if b is not None else "")
        tally.add(outcome or wrong or "survived", f"{name} at {where}")
    tally.notes |= {"cases": len(todo)}
