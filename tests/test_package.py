"""What an installed package is: built in both forms, importable beside torch alone, typed, and each extra named when it is wanted."""
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

import relkd

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
WEIGHTS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("relkd/weights/**/*") if p.is_file())


def names(requirements):
    return {re.match(r"[A-Za-z0-9_.-]+", r)[0].lower() for r in requirements.split()}


@pytest.mark.parametrize("extra", relkd.EXTRAS)
def test_the_modules_of_an_extra_are_those_of_its_packages(extra):
    of = packages_distributions()
    here = [m for m in relkd.EXTRAS[extra] if m in of]
    assert (here or extra == "text") and all({d.lower() for d in of[m]} & names(settings[f"{extra}_requirements"]) for m in here)
    assert len(relkd.EXTRAS[extra]) == len(names(settings[f"{extra}_requirements"]) - {"torch"})     # the lab reads files: from 2.10 on


def test_names_and_version():
    assert relkd.__version__ == settings["version"] and "torch and nothing else" in relkd.__doc__
    assert relkd.losses.RKD and relkd.extra_of("matplotlib.pyplot") == "lab" and relkd.extra_of("torch") == ""
    with pytest.raises(AttributeError, match="module 'relkd' has no attribute 'loses'"):
        relkd.loses
    with pytest.raises(AttributeError):
        relkd._loses


def test_the_source_distribution_holds_what_builds_and_tests_it(distributions):
    with tarfile.open(distributions[0]) as t:
        inside = {name.split("/", 1)[1] for name in t.getnames() if "/" in name}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "relkd/py.typed", "tests/helpers.py", "tests/conftest.py"} <= inside
    assert {*WEIGHTS} <= inside
    assert not [name for name in inside if name.startswith(("nbs/", "figures/", ".data")) or "__pycache__" in name]


def test_the_wheel_says_what_it_needs(distributions):
    with zipfile.ZipFile(distributions[1]) as z:
        inside = z.namelist()
        metadata = z.read(next(n for n in inside if n.endswith("METADATA"))).decode()
    assert {"relkd/py.typed", *WEIGHTS} <= {*inside} and not [n for n in inside if n.startswith("tests")]
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.M)
    assert [n for n in needs if "extra ==" not in n] == ["torch<3,>=2.4"]
    assert {*re.findall(r"^Provides-Extra: (.*)$", metadata, flags=re.M)} == {"clients", "dev", "lab", "metric", "site", "slurm", "text"}


def closure(package, found):
    "A package and what it needs, as installed here."
    try:
        d = distribution(package)
    except PackageNotFoundError:
        return found
    if d.name.lower() not in found:
        found[d.name.lower()] = d
        for r in d.requires or ():
            if "extra ==" not in r:
                closure(re.match(r"[A-Za-z0-9_.-]+", r)[0], found)
    return found


@pytest.fixture(scope="module")
def torch_alone(wheel, tmp_path_factory):
    "A folder with the wheel, torch and what torch needs: as `pip install relkd` leaves it."
    site = shutil.copytree(wheel, tmp_path_factory.mktemp("alone") / "site")
    for d in closure("torch", {}).values():
        for top in {f.parts[0] for f in d.files or () if f.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(d.locate_file(top))
    return site


def run_in(site, code):
    start = f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(site)!r}]\n"
    return subprocess.run([sys.executable, "-S", "-W", "ignore", "-c", start + code], capture_output=True, text=True, cwd=site)


def test_losses_features_and_objective_run_beside_torch_alone(torch_alone):
    code = """
import torch, relkd
from relkd.distill import Objective, Row, Term
from relkd.features import Features
from relkd.losses import RKD, FitNet
import relkd.heads, relkd.relations, relkd.models
s, t = (Features(relkd.models.create('resnet8x0.5', 5, seed=k), ['logits', 'fc:input']) for k in (0, 1))
x = torch.randn(6, 3, 8, 8)
RKD()(s(x)['fc:input'], t(x)['fc:input'].detach()).backward()
loaded = [m for m in ('numpy', 'torchvision', 'pandas', 'typer', 'lightning_fabric') if m in sys.modules]
print(relkd.__file__, loaded)
"""
    done = run_in(torch_alone, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(torch_alone / "relkd" / "__init__.py"), "[]"]


def test_published_weights_embed_texts_beside_torch_alone(torch_alone):
    code = """
import sys, relkd
net = relkd.models.load('wordnet/ngrams16384x64')
e = net.encode(['a large wild cat', 'a big feline', 'a ship on the ocean'])
print(tuple(e.shape), bool(e[0] @ e[1] > e[0] @ e[2]), round(float(e[2].norm()), 4))
print([m for m in 'numpy safetensors tokenizers wordllama lightning_fabric relkd.data relkd.tasks'.split() if m in sys.modules])
"""
    done = run_in(torch_alone, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(3, 64) True 1.0", "[]"]


def test_what_comes_with_the_package_is_small():
    """Weights alone are larger than a megabyte, and they lie in a folder of their own."""
    large = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in ROOT.glob("relkd/**/*")
             if p.is_file() and p.stat().st_size > 2**20 and p.suffix != ".pyc"}
    assert set(large) <= {*WEIGHTS} and sum(large.values()) < 4 * 2**20 and len(WEIGHTS) >= 2, large


LACKING = {
    "import relkd.data": 'relkd.data.sets needs numpy: pip install "relkd[lab]"',
    "import relkd.plots": 'relkd.plots needs numpy: pip install "relkd[lab]"',
    "import relkd; relkd.command_line()": 'relkd: relkd.cli needs typer: pip install "relkd[lab]"',
    "import numpy": "No module named 'numpy'",
}


def test_a_name_that_needs_an_extra_says_which(torch_alone):
    code = f"""
for code in {list(LACKING)}:
    try: exec(code)
    except (ImportError, SystemExit) as error: print(error)
"""
    done = run_in(torch_alone, code)
    assert done.returncode == 0, done.stderr
    for said, line in zip(done.stdout.splitlines(), LACKING.values(), strict=True):
        assert said.endswith(line.removeprefix("relkd.data.sets ")), said


CLIENT = """
import torch
from relkd.losses import RKD
from relkd.relations import pdist

reveal_type(pdist(torch.randn(3, 4)))
reveal_type(RKD(25., 50.)(torch.randn(4, 3), torch.randn(4, 5)).item)
RKD(w_dist=3.)
"""


def test_a_type_checker_sees_the_types(tmp_path):
    ty = Path(sys.executable).with_name("ty")
    if not ty.exists():
        pytest.skip("the type checker ty is not installed")
    (tmp_path / "client.py").write_text(CLIENT)
    done = subprocess.run([ty, "check", "--output-format", "concise", "--python", Path(sys.executable).parents[1],
                           "--extra-search-path", ROOT, "client.py"], capture_output=True, text=True, cwd=tmp_path)
    assert "Revealed type: `Tensor`" in done.stdout and "bound method Tensor.item" in done.stdout, done.stdout + done.stderr
    assert "Argument `w_dist` does not match any known parameter" in done.stdout
