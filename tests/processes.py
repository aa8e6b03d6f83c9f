"""Python in a process group of its own, of which nothing is left."""

import json
import os
import subprocess
import sys

import psutil


def members(group):
    """The living processes of a process group."""
    alive = [p for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in alive if group_of(process.pid) == group]


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def run(arguments, folder, timeout=120, python=sys.executable, **environment):
    """Run Python in a process group of its own; its exit code and output, once nothing of the group is left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen([python, *map(str, arguments)], cwd=folder, env=environment, text=True,
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)  # ends when the last holder of the pipe has closed it
        _, left = psutil.wait_procs(members(process.pid), timeout=5)
        assert not left
    finally:
        for member in members(process.pid):
            member.kill()
    return process.returncode, output


def records_of_both_ranks(folder, names):
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)] for name in names}
