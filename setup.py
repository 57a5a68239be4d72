"""Packaging: everything it says stands in settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
readme = here / "README.md"
cfg = config["DEFAULT"]
extras = {"lab": cfg["lab_requirements"].split()}                 # every other extra stands on the lab
for name in ("metric", "slurm", "text", "clients", "dev"):
    extras[name] = [*extras["lab"], *cfg[f"{name}_requirements"].split()]
extras["dev"] += [*extras["metric"], *extras["slurm"]]
extras["site"] = cfg["site_requirements"].split()                # its own environment, without the package

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="MIT",
    keywords=cfg["keywords"],
    packages=find_packages(include=["relkd", "relkd.*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": ["relkd = relkd:command_line"], "nbdev": ["relkd = relkd._modidx:d"]},
    package_data={"relkd": ["py.typed", "weights/*/*"]},
    url=cfg["doc_host"] + cfg["doc_baseurl"],
    classifiers=["License :: OSI Approved :: MIT License", "Programming Language :: Python :: 3", "Typing :: Typed"],
    zip_safe=False,
)
