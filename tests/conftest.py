import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("relkd", derandomize=True, deadline=None)      # the same examples in every run
settings.load_profile("relkd")


LONGEST = ["20_zoo", "test_processes", "test_notebook_executes", "test_run.py", "test_cli.py", "test_rehearsal"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "What takes long starts first, so that no worker is left with it at the end; what looks at the package's files is one worker's."
    for item in items:
        if "distributions" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("distributions"))

    def place(item):
        return next((k for k, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))

    items.sort(key=place)


def pytest_addoption(parser):
    parser.addoption("--flags", default="", help="run the notebook cells with these flags too: 'slow', 'slow cuda'")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def flags(request):
    return request.config.getoption("--flags")


@pytest.fixture(scope="session")
def relkd_env():
    """The environment of a process that a test starts."""
    return {k: v for k, v in os.environ.items() if "COLOR" not in k} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def distributions(tmp_path_factory):
    "The source distribution, and the wheel made from it; built in a copy, since a build writes beside its sources."
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("relkd", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]"))
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(distributions, tmp_path_factory):
    "The package as a wheel installs it: no checkout, no notebooks, no records."
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(distributions[1]) as z:
        z.extractall(site)
    return site


@pytest.fixture
def relkd_cli(relkd_env):
    """Run the command line in a process of its own: relkd_cli('run', 'digits', ...) -> CompletedProcess."""
    env = relkd_env

    def call(*args, **kw):
        return subprocess.run([sys.executable, "-m", "relkd.cli", *map(str, args)], capture_output=True, text=True, env=env, cwd=ROOT, **kw)

    call.env = env
    return call


@pytest.fixture
def typed(monkeypatch, capsys):
    """Run the command line in this process: typed('run', 'digits', ...) -> (exit status, stdout, stderr)."""
    import warnings

    from relkd.cli import main

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["relkd", *map(str, args)])
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return call
