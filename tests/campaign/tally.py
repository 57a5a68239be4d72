"""What came of each case, and how a case is tried so that nothing it does can hurt the campaign."""
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager


class Tally:
    """How many cases of a kind ended how."""
    def __init__(self, name, seconds):
        self.name, self.seconds, self.deadline, self.begun = name, seconds, None, time.perf_counter()
        self.survived = self.noticed = self.said = 0
        self.failures, self.notes = [], {}

    @property
    def tried(self):
        return self.survived + self.noticed + self.said + len(self.failures)

    def going(self):
        """Is there time for one more? The first time it is asked is when the time begins."""
        self.deadline = self.deadline or time.perf_counter() + self.seconds
        return time.perf_counter() < self.deadline

    def add(self, outcome, what=""):
        """`outcome`: 'survived', as if nothing had happened; 'noticed', another result that says of itself that
        it is another; 'said', refused in one line; all else is a failure, in words."""
        if outcome in ("survived", "noticed", "said"):
            setattr(self, outcome, getattr(self, outcome) + 1)
        else:
            self.failures.append(f"{what}: {outcome}" if what else outcome)

    def as_record(self):
        took = round(time.perf_counter() - self.begun, 1)
        return {"name": self.name, "tried": self.tried, "survived": self.survived, "noticed": self.noticed,
                "one line": self.said, "failed": len(self.failures), "seconds": took, **self.notes,
                **({"failures": self.failures[:10]} if self.failures else {})}


class Hung(BaseException):
    pass


def refusal(error):
    """The outcome of an exception: a line that a user can act on, or a failure."""
    text = str(error)
    if isinstance(error, (ValueError, OSError)):
        return "said" if text and "\n" not in text else f"a refusal of several lines: {text[:80]!r}"
    where = traceback.extract_tb(error.__traceback__)
    mine = next((f for f in reversed(where) if "relkd" in f.filename), where[-1] if where else None)
    place = f"{os.path.basename(mine.filename)}:{mine.lineno}" if mine else "?"
    return f"{type(error).__name__}: {text[:80]!r} at {place}"


def judged(call, seconds=20):
    """(outcome or None, what the call gave): in this process, quietly, and not for ever."""
    def ring(number, frame):
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, patience(seconds))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return None, call()
    except Hung:
        return f"no end within {seconds} s", None
    except Exception as error:
        return refusal(error), None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _address_space(more):
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def start(call, memory=None, cpu=None, output=os.devnull):
    """Fork a child that makes this call: (its number, the pipe that its answer comes through)."""
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        os.close(read)
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if memory:
            _address_space(memory)
        if cpu:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = [None, call()]
    except SystemExit as left:
        answer = [None, left.code or 0]
    except Exception as error:
        answer = [refusal(error), None]
    except BaseException as error:
        answer = [type(error).__name__, None]
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(write, "w") as f:
        json.dump(answer, f, default=str)
    os._exit(0)


def patience(seconds):
    """So many seconds of a quiet machine."""
    return seconds * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)) * 1.5


def finish(child, read, seconds=60):
    """[outcome or None, what it gave] of a child: it died by a signal, or had to be killed, is an outcome too."""
    ready, _, _ = select.select([read], [], [], patience(seconds))
    if not ready:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as f:
        text = f.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not ready:
        return [f"no end within {seconds} s", None]
    if text:
        return json.loads(text)
    return [f"ended by {signal.Signals(-code).name}" if code < 0 else f"left with {code}", None]


def in_child(call, seconds=60, memory=None, cpu=None):
    """`call` in a process of its own: [outcome or None, what it gave], within bounds."""
    return finish(*start(call, memory, cpu), seconds)


@contextmanager
def patched(*changes):
    """(object, name, new) for a while."""
    before = [(o, n, getattr(o, n)) for o, n, _ in changes]
    try:
        for o, n, new in changes:
            setattr(o, n, new)
        yield
    finally:
        for o, n, old in before:
            setattr(o, n, old)


def text_of(tallies):
    """The table, for a terminal."""
    heads = ("tried", "survived", "noticed", "one line", "failed")
    lines = [f"{'':28}" + "".join(f"{h:>10}" for h in heads) + f"{'seconds':>10}"]
    for r in tallies:
        lines.append(f"{r['name']:28}" + "".join(f"{r[h]:>10,}" for h in heads) + f"{r['seconds']:>10.0f}")
    total = {h: sum(r[h] for r in tallies) for h in (*heads, "seconds")}
    lines += ["-" * 88, f"{'all':28}" + "".join(f"{total[h]:>10,}" for h in heads) + f"{total['seconds']:>10.0f}"]
    return "\n".join(lines)
