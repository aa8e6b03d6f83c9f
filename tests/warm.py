"""A Python that starts at once: processes forked from a server that has imported torch, Lightning and DeepSpeed already.

Importing them takes seven seconds of a core in every process, and the suite starts hundreds. `warm_python()` is
used as `sys.executable` is: it hands its arguments, environment, folder and open files to the server, which forks the
process; signals and the exit status pass between the two, and where either is killed, so is the other. Each process has
still memory, files and a process id of its own. Tests that kill a process by its id, or look at what is imported, start
`sys.executable` itself.
"""

import array
import atexit
import ctypes
import gc
import importlib.machinery
import json
import os
import random
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

# The last two DeepSpeed imports in every rank, and with them all of torch's compiler.
PRELOADED = ("lightning.pytorch", "torch._dynamo", "deepspeed", "ipykernel.kernelapp", "papermill", "pandas", "pyarrow.parquet",
             "matplotlib.pyplot", "optuna", "torch.utils.tensorboard", "sklearn.datasets", "pydantic",
             "sqlalchemy.orm", "torch.utils.cpp_extension", "fastcore.test",
             "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer",
             "dlnb.trainer", "dlnb.infer", "dlnb.tuner", "dlnb.engine", "dlnb.examples")  # fmt: skip
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys

def end(number):
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

words = sys.argv[1:]
while words[:1] == ["-B"]:  # which multiprocessing adds where no bytecode is to be written
    del words[0]
if not words or (words[0] not in ("-m", "-c") and words[0].startswith("-")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
files = [file for file in map(int, os.listdir("/proc/self/fd")) if file != server.fileno() and os.path.exists(f"/proc/self/fd/{{file}}")]
request = dict(argv=words, environment=dict(os.environ), folder=os.getcwd(), files=files, parent=os.getppid(),
               ignored=[n for n in {forwarded} if signal.getsignal(n) == signal.SIG_IGN])
file = os.memfd_create("request")
os.write(file, json.dumps(request).encode())
server.sendmsg([b"start"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file, *files]))])
pid = int(server.recv(32))
for number in {forwarded}:
    if number not in request["ignored"]:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
for opened in files:
    if opened > 2:
        os.close(opened)
code = int(server.recv(32) or -9)
end(-code) if code < 0 else os._exit(code)
"""


SERVERS: list[subprocess.Popen] = []  # their input is open as long as this process lives


@cache
def warm_python() -> str:
    "The executable; its server is started by the first call and ends with this process, however that ends."
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    # Beside the real one, where IPython and DeepSpeed look for what belongs to an environment.
    executable = Path(sys.executable).with_name(f"{folder.name}-python")
    address = str(folder / "socket")
    executable.write_text(CLIENT.format(python=sys.executable, address=address, forwarded=tuple(map(int, FORWARDED))))
    executable.chmod(0o755)
    command = [sys.executable, "-u", __file__, address, str(executable)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    SERVERS.append(server)
    while not os.path.exists(address):
        assert server.poll() is None, "the server of warm processes has died"
        time.sleep(0.05)
    return str(executable)


def processes_left(within: float = 15) -> list[psutil.Process]:
    "The warm processes of this test process that still run, and what they have started, `within` seconds from now."
    return left_of(running_children, within)


def left_of(processes: Callable[[], Iterable[psutil.Process]], within: float) -> list[psutil.Process]:
    "Those that still run `within` seconds from now; they are asked for again at each look."
    deadline = time.monotonic() + within
    while (left := [*filter(is_running, processes())]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def running_children() -> list[psutil.Process]:
    return [child for server in SERVERS for child in psutil.Process(server.pid).children(recursive=True)]


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(process: psutil.Process) -> list[psutil.Process]:
    "What a process has started, and those have, warm ones too. One look at all processes, which takes some milliseconds."
    children: dict[int, list[psutil.Process]] = {}
    for other in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            children.setdefault(other.ppid(), []).append(other)
    for path in [
        path for server in SERVERS for path in Path(server.args[-2]).parent.glob("*[0-9]")
    ]:  # by a client's id that of its process
        with suppress(psutil.NoSuchProcess, ValueError, OSError):
            children.setdefault(int(path.name), []).append(psutil.Process(int(path.read_text())))
    found, parents = [], [process]
    while parents:
        parents = [child for parent in parents for child in children.pop(parent.pid, [])]
        found += parents
    return found


def process_behind(client: psutil.Process) -> psutil.Process:
    "The process that a client stands for."
    notes = [Path(server.args[-2]).with_name(str(client.pid)) for server in SERVERS]
    return next(psutil.Process(int(path.read_text())) for path in notes if path.exists())


class Late:
    "A stream that writes to what `sys.stdout` or `sys.stderr` is at that time: loggers keep the stream of their import."

    def __init__(self, name: str, stream):
        self._name, self._stream, self._loading = name, stream, True

    def __getattr__(self, attribute: str):
        current = self if self._loading else getattr(sys, self._name)  # what is imported may wrap the stream that it finds
        return getattr(self._stream if current is self else current, attribute)


def free_port() -> int:
    "A port below those that the system gives to connections: no other process gets it by chance before this one listens."
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            return port


def preload() -> None:
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    late = [Late(name, stream) for name, stream in streams.items()]
    sys.stdout, sys.stderr = late
    from lightning.fabric.plugins.environments import lightning

    lightning.find_free_network_port = free_port
    for module in PRELOADED:
        __import__(module)
    sys.stdout, sys.stderr = streams.values()
    for stream in late:
        stream._loading = False
    import cpuinfo  # DeepSpeed asks twice in every rank, and the answer takes more than a second

    facts = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: facts


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    "What a client asks for, and its open files."
    _, [(_, _, data)], _, _ = connection.recvmsg(16, socket.CMSG_SPACE(4 * 250))
    request, *files = array.array("i", data)
    os.lseek(request, 0, os.SEEK_SET)
    with os.fdopen(request) as file:
        return json.load(file), files


def serve(listener: socket.socket) -> tuple[dict, list[int]] | None:
    "Fork a process for each request until this process's input ends; returns the request in each forked one."
    waiting, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes: dict[int, socket.socket] = {}
    zombies: dict[int, float] = {}  # and when they are reaped: until then /proc tells how they ended, as it does of a real child
    with selectors.DefaultSelector() as selector:
        for source in (listener, waiting, sys.stdin.buffer.raw):
            selector.register(source, selectors.EVENT_READ)
        while True:
            reap(zombies)
            for key, _ in selector.select(1 if zombies else None):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    try:
                        request, files = receive(connection)
                    except (ValueError, OSError):  # the client was killed before it could ask
                        connection.close()
                        continue
                    if not (pid := os.fork()):
                        return request, files
                    for file in files:
                        os.close(file)
                    note(connection, pid)
                    processes[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                    with suppress(OSError):  # a client that has died meanwhile is seen by the selector
                        connection.send(str(pid).encode())
                elif key.fileobj is waiting:
                    waiting.recv(4096)
                    report_ended(processes, zombies, selector)
                elif key.data in processes:  # a client has died
                    os.kill(key.data, signal.SIGKILL)
                    selector.unregister(key.fileobj)
                elif key.fileobj is sys.stdin.buffer.raw:
                    for pid in processes:
                        os.kill(pid, signal.SIGKILL)
                    return None


def note(connection: socket.socket, pid: int) -> None:
    "Which process a client stands for, for `descendants`."
    Path(connection.getsockname()).with_name(str(client_of(connection))).write_text(str(pid))


def client_of(connection: socket.socket) -> int:
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def report_ended(processes: dict[int, socket.socket], zombies: dict[int, float], selector) -> None:
    for pid in list(processes):
        if not (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            continue
        zombies[pid], connection = time.monotonic() + 5, processes.pop(pid)
        with suppress(KeyError):  # its client has died before
            selector.unregister(connection)
        Path(connection.getsockname()).with_name(str(client_of(connection))).unlink()
        with suppress(OSError):
            connection.send(str(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status).encode())
        connection.close()


def reap(zombies: dict[int, float]) -> None:
    for pid in [pid for pid, when in zombies.items() if when < time.monotonic()]:
        os.waitpid(pid, 0)
        del zombies[pid]


def become(request: dict, files: list[int], executable: str) -> None:
    "Be the process that a client has asked for, up to its first line of code."
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whatever ends the server ends its processes
    for place, file in enumerate(files):  # out of the way of the numbers that they are to have
        os.dup2(file, 500 + place)
    os.closerange(3, 500)
    for place, number in enumerate(request["files"]):
        os.dup2(500 + place, number)
    os.closerange(500, 800)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if "ipykernel_launcher" in request["argv"]:  # the kernel sets it too, and too late for a matplotlib that is imported
        os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    os.getppid = lambda: request["parent"]
    sys.executable = executable
    import multiprocessing.spawn

    multiprocessing.spawn.set_executable(executable)
    tempfile.tempdir = None  # which this environment may place elsewhere
    reseed()


def reseed() -> None:
    "Forked processes have the same random states; processes that are started have not. And matplotlib reads its backend once."
    import matplotlib
    import numpy
    import torch

    numpy.random.seed()
    torch.seed()
    if backend := os.environ.get("MPLBACKEND"):
        matplotlib.rcParams["backend"] = backend


def forget_other_dlnb(executed: str) -> None:
    "Where this process is to find another copy of dlnb than the server has, it imports that; and what it executes by `-m` is not imported yet."
    found = importlib.machinery.PathFinder.find_spec("dlnb")
    is_other = found is not None and found.origin != sys.modules["dlnb"].__file__
    for name, module in [*sys.modules.items()]:
        if (name == executed and not hasattr(module, "__path__")) or (is_other and name.partition(".")[0] == "dlnb"):
            del sys.modules[name]


def run(argv: list[str]) -> None:
    "What `python *argv` runs, in a main module of its own: it must not find names that it has not imported."
    import runpy

    kind, *rest = argv
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    where = {"-m": os.getcwd(), "-c": ""}.get(kind, str(Path(kind).resolve().parent))
    sys.path[0:1] = [where, *filter(None, inherited)]
    forget_other_dlnb(rest[0] if kind == "-m" else "")
    if kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy._run_module_as_main(rest[0], alter_argv=True)
        return
    sys.argv = ["-c", *rest[1:]] if kind == "-c" else argv
    file, source = ("<string>", rest[0]) if kind == "-c" else (kind, Path(kind).read_text())
    if kind != "-c":
        main.__file__ = kind
    exec(compile(source, file, "exec"), vars(main))


def end(code: int) -> None:
    """End as Python does up to its exit handlers, and leave the objects alone: to free those that were imported takes most of a
    second, since the pages that they are in are shared with the server until they are written to. What goes wrong while objects
    are freed is for tests that start `sys.executable` itself."""
    try:
        threading._shutdown()  # which waits for threads
    except KeyboardInterrupt:
        code = -signal.SIGINT
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it may be closed, or none
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def exit_code(argv: list[str]) -> int:
    "Run it; what its process is to return, or the negative number of the signal that is to end it."
    try:
        run(argv)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    address, executable = sys.argv[1:]
    preload()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    gc.collect()
    gc.freeze()
    if started := serve(listener):
        become(*started, executable)
        end(exit_code(started[0]["argv"]))
    else:
        Path(executable).unlink()
        shutil.rmtree(Path(address).parent)
        os._exit(0)
