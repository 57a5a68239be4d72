"""The stages of a GPU's half hour, with a small recipe on a CPU."""
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

STAGES = Path(__file__).resolve().parents[1] / ".ci" / "gpu"


def stage(folder, *words):
    env = os.environ | {"W": str(folder), "OUT": str(folder / "back"), "PY": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", STAGES, *words], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_stages_are_told(tmp_path):
    code, said = stage(tmp_path)
    assert code == 0 and all(word in said for word in ("check", "profile NAME", "start NAME", "watch SECONDS", "publish NAME"))


def test_a_run_goes_on_between_calls_and_its_records_come_back(tmp_path, flags):
    if "slow" not in flags:
        pytest.skip("a run in a process of its own: --flags slow")
    code, said = stage(tmp_path, "start", "digits", "--rows", "HKD", "--seeds", "0", "--epochs", "2")
    assert code == 0 and "started digits" in said
    code, said = stage(tmp_path, "watch", "0")
    assert code == 0 and "STILL RUNNING" in said
    code, said = stage(tmp_path, "watch", "120")
    assert code == 0 and "ALL OVER" in said and "HKD" in said, said
    with tarfile.open(tmp_path / "back" / "out.tgz") as t:
        assert len([n for n in t.getnames() if n.startswith("out/records/digits-2epochs/")]) == 3
    code, said = stage(tmp_path, "publish", "digits", "--epochs", "2", "--rows", "HKD", "--seeds", "0")
    assert (code == 0 and len([*tmp_path.glob("back/*.safetensors")]) == 2) or "No such option" in said, said
