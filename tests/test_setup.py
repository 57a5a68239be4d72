"""What `make setup` does, with a stand-in for uv: once, after a change, after a move, offline, with little disk,
with a home that is read-only."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

UV = """#!/bin/sh
echo "$@" >> "$LOG"
echo "cache ${UV_CACHE_DIR:-}" >> "$LOG"
[ -z "${OFFLINE:-}" ] || { echo "no network" >&2; exit 2; }
if [ "$1" = venv ]; then
  mkdir -p .venv/bin; printf '#!%s/.venv/bin/python\\n' "$PWD" > .venv/bin/tool
  printf '#!/bin/sh\\nexec PYTHON "$@"\\n' > .venv/bin/python; chmod +x .venv/bin/python
fi
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A copy of what setup reads, a stand-in for uv, and a home."
    here, tools = tmp_path / "relkd", tmp_path / "tools"
    shutil.copytree(ROOT / ".ci", here / ".ci")
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, here)
    tools.mkdir()
    (tmp_path / "home").mkdir()
    (tools / "uv").write_text(UV.replace("PYTHON", sys.executable))
    (tools / "df").write_text("#!/bin/sh\nprintf 'head\\nx 1 1 %s 1\\n' \"${FREE:-90000000}\"\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name in ("XDG_CACHE_HOME", "UV_TORCH_BACKEND", "UV_CACHE_DIR", "VENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return here


def setup(here, **env):
    log = Path(os.environ["LOG"])
    log.write_text("")
    done = subprocess.run(["sh", ".ci/setup"], cwd=here, env=os.environ | env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr, log.read_text().splitlines()


def test_once_and_again_only_when_what_is_asked_has_changed(place):
    code, out, _, calls = setup(place)
    assert code == 0 and "6.3 GB" in out and "UV_TORCH_BACKEND=cpu about 2 GB" in out
    assert calls[0].startswith("venv") and "-C editable_mode=compat -e .[dev]" in calls[2]
    assert setup(place) == (0, "", "", [])
    os.utime(place / "settings.ini")
    assert setup(place) == (0, "", "", [])
    (place / "settings.ini").write_text((place / "settings.ini").read_text() + "\n# more\n")
    code, out, _, calls = setup(place)
    assert code == 0 and "has changed" in out and len(calls) == 2 and calls[0].startswith("pip install")
    assert [*(place.parent / "home").iterdir()] == [place.parent / "home" / ".cache"]


def test_a_folder_that_was_moved_takes_its_environment_along(place):
    setup(place)
    moved = place.rename(place.with_name("renamed"))
    code, out, _, calls = setup(moved)
    assert code == 0 and f"the folder was {place} before" in out and calls == []
    assert (moved / ".venv/bin/tool").read_text() == f"#!{moved}/.venv/bin/python\n"
    assert setup(moved) == (0, "", "", [])


def test_offline_it_goes_on_where_all_is_installed_and_says_what_is_missing_where_not(place):
    setup(place)
    (place / "setup.py").write_text((place / "setup.py").read_text() + "\n")
    code, out, err, _ = setup(place, OFFLINE="1")
    assert code == 0 and "all that settings.ini names is installed: going on" in out
    (place / "settings.ini").write_text((place / "settings.ini").read_text().replace("\nrequirements = ", "\nrequirements = nowhere>=1 "))
    code, _, err, _ = setup(place, OFFLINE="1")
    assert code == 1 and "setup could not install nowhere>=1; it needs 6.3 GB" in err


@pytest.mark.skipif(sys.platform != "linux", reason="torch is small elsewhere")
def test_what_it_takes_is_said_before_anything_is_fetched(place):
    code, _, err, calls = setup(place, FREE="1900000")
    assert code == 1 and calls == [] and "6.3 GB" in err and "1.9 GB are free" in err and "UV_TORCH_BACKEND=cpu make setup" in err
    assert setup(place, FREE="2900000", UV_TORCH_BACKEND="cpu")[0] == 0


def test_nothing_is_written_into_a_home_that_is_read_only(place):
    (place.parent / "home" / ".cache").write_text("a file where the folder would be: not even root can make it")
    code, _, _, calls = setup(place)
    assert code == 0 and calls[1] == f"cache {place}/.venv/.cache"


@pytest.mark.parametrize("owner", ["mine", "another's"])
def test_hooks_are_a_luxury(place, owner):
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    own = place / ".git/hooks/post-merge"
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine\n")
    assert setup(place, **({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"} if owner != "mine" else {}))[0] == 0
    assert own.read_text() == "mine\n" and (place / ".venv/.ready").exists()
    asked = subprocess.run(["git", "config", "--local", "include.path"], cwd=place, capture_output=True, text=True).stdout
    assert asked == ("../.gitconfig\n" if owner == "mine" else "")


def test_without_an_environment_a_merge_keeps_both_sides(tmp_path):
    """The driver of notebooks lies in .venv, which a new work tree lacks."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True)

    git("init", "-q", "-b", "main")
    git("config", "user.email", "a@b.c")
    git("config", "user.name", "a")
    for name in (".gitconfig", ".gitattributes"):
        shutil.copy(ROOT / name, tmp_path)
    git("config", "--local", "include.path", "../.gitconfig")
    for branch, text in (("main", "both\n"), ("theirs", "theirs\n"), ("main", "ours\n")):
        if branch == "theirs":
            git("checkout", "-qb", branch)
        elif text == "ours\n":
            git("checkout", "-q", branch)
        (tmp_path / "a.ipynb").write_text(text)
        git("add", "-A")
        git("commit", "-qm", text)
    assert git("merge", "theirs").returncode == 1
    merged = (tmp_path / "a.ipynb").read_text()
    assert "ours" in merged and "theirs" in merged and "<<<<<<<" in merged


def test_a_dev_container_makes_what_a_reader_makes():
    """Codespaces and editors read it; here it is read as they read it."""
    import json
    import re

    said = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    version = re.fullmatch(r"python:3\.(\d+)-\w+", said["image"])
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    command, target = said["postCreateCommand"].split()
    assert version and 10 <= int(version[1]) and command == "make" and target in targets and "lab" in targets
    assert said["forwardPorts"] == [8888] and [*said["portsAttributes"]] == ["8888"]         # JupyterLab's own
    interpreter = said["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == "${containerWorkspaceFolder}/.venv/bin/python"
