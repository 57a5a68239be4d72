"""Run notebooks in place, as a reader would, and keep their outputs.

Cells flagged with one of settings.ini's `tst_flags` (`slow`, `cuda`, `clients`) are left as they are, outputs included,
unless the flag is named: `python .ci/execute.py --flags "slow" nbs/tables/00_digits.ipynb`.
"""
import argparse
import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient

root = Path(__file__).resolve().parents[1]
sys.path.append(str(root / "tests"))
from listed import project_notebooks  # noqa: E402


class Client(NotebookClient):
    skip: set = set()

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        flags = {m.split(":")[0] for m in re.findall(r"^#\|\s*(\S+)", cell.source, flags=re.M)}
        if cell.cell_type == "code" and flags & self.skip:
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook under nbs/ but drafts")
    p.add_argument("--flags", default="", help="flags to run all the same, separated by spaces")
    args = p.parse_args()
    cfg = ConfigParser(delimiters=["="])
    cfg.read(root / "settings.ini", encoding="utf-8")
    skip = set(cfg["DEFAULT"]["tst_flags"].split()) - set(args.flags.split())
    os.environ["RELKD_FLAGS"] = args.flags                     # `%load_ext relkd.flags` lets such cells run
    for path in args.notebooks or project_notebooks():
        nb = nbformat.read(path, as_version=4)
        print("running", path, flush=True)
        client = Client(nb, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
        client.skip = skip
        client.execute()
        nbformat.write(nb, path)


if __name__ == "__main__":
    main()
