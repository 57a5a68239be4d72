"""Print what settings.ini names and this environment lacks, in one line; nothing if all is here."""
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
lists = ("requirements", "lab_requirements", "metric_requirements", "slurm_requirements",
         "dev_requirements")
needed = [r for name in lists for r in settings["DEFAULT"][name].split()]
lacking = []
for r in map(Requirement, [*needed, "relkd"]):
    try:
        if not r.specifier.contains(version(r.name), prereleases=True):
            lacking.append(str(r))
    except PackageNotFoundError:
        lacking.append(str(r))
print(", ".join(lacking))
