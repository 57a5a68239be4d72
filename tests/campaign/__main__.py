"""`python -m tests.campaign`: see the package."""
import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from campaign import damage, disk, hostile, kills, losses
from campaign.tally import Tally, text_of
from relkd.ground import write_atomically
from relkd.models import create
from relkd.records import environment

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "figures/records/bench/campaign.json"
PARTS = {                     # name -> (share of the time, function of (tally, folder, random numbers))
    **{f"kills, {kind}": (3, lambda *a, kind=kind: kills.signals(*a, kind)) for kind in kills.KINDS},
    **{f"file operations, {kind}": (3, lambda *a, kind=kind: kills.points(*a, kind))
       for kind in ("classification", "few-shot")},
    "two runs in one folder": (1, lambda *a: kills.together(*a, "classification")),
    "checkpoints": (2, damage.checkpoints),
    "bits of a manifest": (1, damage.manifests),
    "runs on damaged files": (2, damage.runs),
    "records": (1, damage.records), "published weights": (1, damage.weights),
    **{f"data, {which}": (1, lambda *a, which=which: damage.data(*a, which)) for which in damage.SETS},
    "hostile files and options": (5, hostile.hostile),
    "full disk": (1, disk.full),
    "files that may not grow": (1, disk.file_size),
    "folders taken away": (1, disk.taken_away),
    "losses on anything": (3, losses.anything), "losses at every scale": (2, losses.scales),
}


def warm():
    """Import here what a case may need, so that no child has to."""
    for name in ("matplotlib.figure", "seaborn", "pandas", "scipy.stats", "safetensors.torch", "pooch", "relkd.cli",
                 "relkd.recipes.digits", "torch.utils.tensorboard", "relkd.tables.paired", "relkd.plots"):
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    with torch.device("meta"):                                # imports more than one would think
        create("resnet8x0.25", 10, 3).state_dict()


def campaign(seconds, only, seed):
    """Run the parts, one after the other; yields what stands in the record of each."""
    chosen = [name for name in PARTS if not only or any(word in name for word in only)]
    if not chosen:
        sys.exit(f"no part of the campaign is called {' or '.join(only)}: known are {', '.join(PARTS)}")
    shares = sum(PARTS[name][0] for name in chosen)
    for name in chosen:
        at = Path(tempfile.mkdtemp(prefix="campaign"))
        tally = Tally(name, seconds * PARTS[name][0] / shares)
        try:
            PARTS[name][1](tally, at, random.Random(f"{seed} {name}"))
        finally:
            shutil.rmtree(at, ignore_errors=True)
        print(f"{name}: {tally.tried:,} tried, {len(tally.failures)} failed", file=sys.stderr, flush=True)
        for line in tally.failures[:10]:
            print(f"    {line[:400]}", file=sys.stderr, flush=True)
        yield tally.as_record()


def main():
    options = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    options.add_argument("--seconds", type=float, default=600, help="for all parts together")
    options.add_argument("--only", default="", help="parts whose names hold one of these words: 'kills,records'")
    options.add_argument("--seed", type=int, default=0, help="of the random numbers")
    options.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    given = options.parse_args()
    torch.set_num_threads(1)
    warm()
    os.fsync = lambda handle: None                            # processes are killed here, not machines
    found = list(campaign(given.seconds, [w.strip() for w in given.only.split(",") if w.strip()], given.seed))
    print(text_of(found))
    if given.record:
        made = {"seed": given.seed, "seconds": given.seconds, **environment(torch.device("cpu")), "parts": found}
        write_atomically(RECORD, (json.dumps(made, indent=1) + "\n").encode())
    sys.exit(any(r["failed"] for r in found))


if __name__ == "__main__":
    main()
