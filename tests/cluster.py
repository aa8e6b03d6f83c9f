"""Two SLURM nodes on one machine: a munged, a slurmctld and two slurmd of their own, in a folder; `cluster` starts and ends them.

Needs root and Debian's `slurm-wlm` and `munge`; a munged or SLURM that runs already is not touched."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from dlnb.system.process_group import guard

NODES = ("n0", "n1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel")
HOSTS = Path("/etc/hosts")
CONFIGURATION = """ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=15
MinJobAge=300
JobCompType=jobcomp/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""
CGROUP = "CgroupPlugin=cgroup/v1\nConstrainCores=no\n"  # without it a step hangs at launch


def missing() -> str | None:
    "Why there can be no cluster here, or None."
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"SLURM is not installed ({', '.join(lacking)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "SLURM's daemons start the jobs of other users: root is needed"
    return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def hosts_named(*names: str):
    "The names in /etc/hosts: torch resolves a node's name."
    line = f"127.0.0.1 {' '.join(names)}  # two SLURM nodes of a test\n"
    with HOSTS.open("a") as file:
        file.write(line)
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(line, ""))  # also what a killed test has left


class Cluster:
    "Its commands, from outside of any allocation."

    def __init__(self, folder: Path):
        self.folder = folder
        self.configuration = str(folder / "slurm.conf")

    def call(self, *command: str) -> str:
        "Run a command to its end; what it printed. Raises `CalledProcessError`."
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment["SLURM_CONF"] = self.configuration
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    def wait_until_idle(self, within: float = 60) -> None:
        "Until both nodes take jobs."
        deadline = time.monotonic() + within
        while self.call("sinfo", "-hN", "-o", "%T").split() != ["idle"] * len(NODES):
            if time.monotonic() > deadline:
                logs = "".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
                raise TimeoutError(f"the nodes are not idle after {within} s:\n{logs}")
            time.sleep(0.3)


@contextmanager
def daemon(*command: str, folder: Path):
    "A program in the foreground, ended at the end."
    with (folder / f"{Path(command[0]).name}.output").open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        with guard(process.pid):  # should the tests be killed
            yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_configuration(folder: Path) -> None:
    "All of it in one folder, which only root may read, as munged insists."
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=socket.gethostname(), ports=free_ports(3)))
    (folder / "cgroup.conf").write_text(CGROUP)


@contextmanager
def cluster(folder: Path):  # an empty folder, by an absolute path
    "Two nodes that are idle; gone at the end, whatever still ran on them."
    write_configuration(folder)
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    configuration = str(folder / "slurm.conf")
    with hosts_named(*NODES), daemon(*munge, folder=folder):
        while not (folder / "munge.socket").exists():
            time.sleep(0.05)
        with daemon("slurmctld", "-D", "-f", configuration, folder=folder):
            with daemon("slurmd", "-D", "-f", configuration, "-N", "n0", folder=folder):
                with daemon("slurmd", "-D", "-f", configuration, "-N", "n1", folder=folder):
                    found = Cluster(folder)
                    found.wait_until_idle()
                    try:
                        yield found
                    finally:
                        found.call("scancel", "--signal=KILL", "--state=RUNNING", "--user=root")
                        found.call("scancel", "--user=root")
                        found.wait_until_idle()
