"""A campaign against the project, by chance and by hand: kills, damage, hostile files, a full disk, losses.

`python -m tests.campaign` from the checkout, minutes: `--seconds 60` for a shorter one,
`--only kills,records` for some of it.
It prints how much was tried, survived, refused in one line, and failed, and with `--record` writes that down.
No part of `make test`: what it found once is a test by itself there."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
