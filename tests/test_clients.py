"""Pages on other people's libraries run whole, each with the library that it is about; they check themselves, parameters of
losses that must move included."""
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import project_notebooks

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"02_lightning": ("lightning",), "03_timm": ("timm",),
         "04_huggingface": ("transformers", "accelerate"), "05_sentence_transformers": ("sentence_transformers", "datasets"),
         "06_metric_learning": ("pytorch_metric_learning",), "07_modelopt": ("modelopt",), "08_torchdistill": ("torchdistill",),
         "09_others": ("skorch", "fastai", "ignite"), "10_names": ("timm", "transformers")}
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
sys.exit(not test_nb(Path(sys.argv[1]), skip_flags=['cuda'])[0])
"""


def test_every_page_is_asked():
    pages = {p.stem for p in project_notebooks("clients/*.ipynb")}
    assert pages == set(NEEDS) | {"index", "00_loop", "01_distributed"}


@pytest.mark.parametrize("page", NEEDS)
def test_page_runs_with_its_library(page, flags, relkd_env):
    if "slow" not in flags:
        pytest.skip("a page with its library takes up to a minute: --flags slow")
    lacking = [name for name in NEEDS[page] if find_spec(name) is None]
    if lacking:
        pytest.skip(f"{page} needs {', '.join(lacking)}: pip install 'relkd[clients]'")
    path = ROOT / "nbs" / "clients" / f"{page}.ipynb"
    env = relkd_env | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
