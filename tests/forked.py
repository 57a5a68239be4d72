"""Processes of their own without the price of their imports: forked from a server that has imported everything."""
import multiprocessing
import os
import sys

PRELOADED = ["torch", "torchvision", "pandas", "matplotlib.pyplot", "seaborn", "nbdev.test", "nbdev.doclinks", "nbformat", "pytest",
             "hypothesis", "sklearn.datasets", "lightning.fabric", "relkd.losses", "relkd.cli", "forked"]


def server():
    "The one server of this process: whoever starts it first decides what has been imported, so everybody asks here."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def begin(target, args, said, env):
    "In the new process: what is printed goes to a file, a warning is printed, and every way out has its exit status."
    os.environ |= env
    with open(said, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    try:
        target(*args)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(target, *args, said=os.devnull, **env):
    "target(*args) in a process of its own, begun: join() it, ask exitcode, read what it said."
    child = server().Process(target=begin, args=(target, args, said, {k: str(v) for k, v in env.items()}))
    child.start()
    return child


def finish(target, *args, said, seconds=500, **env):
    "The same to its end: (exit status, what it said)."
    child = start(target, *args, said=said, **env)
    child.join(seconds)
    child.kill()
    child.join()
    with open(said) as f:
        return child.exitcode, f.read()
