"""A disk that is full, or on which a file may not grow, or whose folders go away: one line, and then all is as it was."""
import resource
import shutil
import signal
import subprocess
import time

from campaign.kills import whole
from campaign.tally import finish, in_child, start
from campaign.tiny import life, result


def _goes_on(recipe, want, out):
    """With room again the same start ends as if nothing had been."""
    outcome, _ = in_child(lambda: life(recipe, out))
    return outcome or ("" if result(recipe, out) == want else "another result")


def file_size(tally, at, rng, kind="classification"):
    """No file may be larger than so many bytes: every write beyond that fails, as on a full disk."""
    recipe, want, _ = whole(kind, at)
    k = 0

    def limited(out, most):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return life(recipe, out, parts=rng.choice([None, 5_000]))

    while tally.going():
        out, most, k = at / f"limit{k}", int(10 ** rng.uniform(1, 5.5)), k + 1
        outcome, _ = in_child(lambda: limited(out, most))
        wrong = "" if outcome in (None, "said") else outcome
        left = sorted(p.name for p in out.rglob("*.tmp"))
        wrong = wrong or (f"left behind: {left}" if left else "") or _goes_on(recipe, want, out)
        tally.add(wrong or (outcome or "survived"), f"{most:,} bytes a file")


def full(tally, at, rng, kind="classification"):
    """A disk of so many kB of its own, where this machine lets one be mounted."""
    recipe, want, _ = whole(kind, at)
    disk = at / "disk"
    disk.mkdir()
    while tally.going():
        size = rng.randrange(8, 700, 4)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        try:
            if subprocess.run(mount, capture_output=True).returncode:
                tally.notes["skipped"] = "no file system can be mounted here"
                return
        except FileNotFoundError:
            tally.notes["skipped"] = "there is no program mount"
            return
        try:
            outcome, _ = in_child(lambda: life(recipe, disk / "out", parts=rng.choice([None, 5_000])))
            wrong = "" if outcome in (None, "said") else outcome
            left = sorted(p.name for p in disk.rglob("*.tmp"))
            subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True, capture_output=True)
            wrong = wrong or (f"left behind: {left}" if left else "") or _goes_on(recipe, want, disk / "out")
        finally:
            subprocess.run(["umount", str(disk)], check=True, capture_output=True)
        tally.add(wrong or (outcome or "survived"), f"a disk of {size} kB")


def taken_away(tally, at, rng, kind="classification"):
    """The folder, its checkpoints or its records are removed while the run writes them."""
    recipe, want, took = whole(kind, at)
    k = 0
    while tally.going():
        out, k = at / f"gone{k}", k + 1
        child = start(lambda: life(recipe, out))
        what = rng.choice(["", ".runs", "records"])
        for _ in range(rng.randint(1, 3)):
            time.sleep(rng.uniform(0, took))
            shutil.rmtree(out / what, ignore_errors=True)
        outcome, _ = finish(*child)
        wrong = ("" if outcome in (None, "said") else outcome) or _goes_on(recipe, want, out)
        tally.add(wrong or (outcome or "survived"), f"{what or 'the folder'} removed")
