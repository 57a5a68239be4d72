"""Slurm with two virtual nodes on this machine, for a test or for trying out what a cluster does.

    apt-get install -y slurmctld slurmd slurm-client munge
    python .ci/slurm.py FOLDER          # Ctrl-C ends it; in another terminal: export SLURM_CONF=FOLDER/slurm.conf

Everything lies in FOLDER, on the loopback interface. Partition `low` makes room for partition `high`: its jobs are queued again.
"""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch"
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={at}/munge.socket,cred_expire=5
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool.%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={at}/jobs.txt
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=2000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def lacking():
    "In words, why Slurm cannot be started here; '' if it can."
    missing = [p for p in PROGRAMS if shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        return f"{missing[0]} is not installed: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.getuid() == 0 else "two nodes of Slurm on one machine are started as root"


class Slurm:
    "Inside `with`, two nodes are up; `env` is what a process needs to see them."
    def __init__(self, at):
        self.at, self.processes = Path(at).resolve(), []
        self.env = os.environ | {"SLURM_CONF": str(self.at / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin"}

    def __enter__(self):
        for name in ("", "state", "spool.n1", "spool.n2"):
            (self.at / name).mkdir(parents=True, exist_ok=True)
        sockets = [socket.socket() for _ in range(3)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        (self.at / "slurm.conf").write_text(CONF.format(host=socket.gethostname().split(".")[0], user="root", at=self.at, ports=ports))
        key = self.at / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{k}={self.at}/munge.{k.split('-')[0]}" for k in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
        self._start("munged", "--foreground", "--force", *files)
        self._until(lambda: (self.at / "munge.socket").exists())
        self._start("slurmctld", "-D", "-f", self.at / "slurm.conf")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-f", self.at / "slurm.conf", "-N", node)
        self._until(lambda: self.call("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False).strip() == "2")
        return self

    def _start(self, *command):
        log = open(self.at / f"{command[0]}.out", "ab")
        self.processes.append(subprocess.Popen([str(c) for c in command], env=self.env, stdout=log, stderr=log, start_new_session=True))

    def _until(self, true, seconds=30):
        end = time.time() + seconds
        while not true():
            if time.time() > end or any(p.poll() is not None for p in self.processes):
                self.__exit__()
                raise RuntimeError("Slurm does not start: " + " ".join(p.read_text()[-300:] for p in self.at.glob("*.log")))
            time.sleep(.1)

    def call(self, *command, check=True):
        "What one of Slurm's programs prints."
        return subprocess.run([str(c) for c in command], env=self.env, check=check, capture_output=True, text=True).stdout

    def __exit__(self, *_):
        self.call("scancel", "--me", check=False)
        end = time.time() + 15
        while self.call("squeue", "-h", check=False).strip() and time.time() < end:
            time.sleep(.2)
        for p in reversed(self.processes):
            p.send_signal(signal.SIGTERM)
        for p in reversed(self.processes):
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                p.kill()
        self.processes = []


if __name__ == "__main__":
    if len(sys.argv) != 2 or lacking():
        sys.exit(lacking() or __doc__)
    with Slurm(sys.argv[1]) as slurm:
        print(f"two nodes are up: export SLURM_CONF={slurm.env['SLURM_CONF']}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            pass
