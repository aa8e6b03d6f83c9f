"""A real kernel, driven as a front end drives it."""

import queue
import re
import time
from typing import NamedTuple

import psutil
from jupyter_client.manager import KernelManager
from warm import descendants

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Shown(NamedTuple):
    "What a cell has shown."

    text: str  # that was printed
    displays: list[dict]  # by MIME type, updates among them
    error: str  # its name, its sentence and its traceback; empty where it has none
    seconds: float

    @property
    def value(self) -> str:
        return self.displays[-1]["text/plain"]


class Kernel:
    "A kernel and what it starts."

    def __init__(self, cwd):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(cwd))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=90)
        self.process = psutil.Process(self.manager.provisioner.process.pid)
        self.family: dict[int, psutil.Process] = {}

    def run(self, code: str, timeout: float = 120, interrupt_after: str = "") -> Shown:
        "Run a cell; press Stop when its output has that text."
        began, sent, texts, displays, error = time.monotonic(), self.client.execute(code), [], [], ""
        while time.monotonic() < began + timeout:
            self.look()
            try:
                message = self.client.get_iopub_msg(timeout=0.2)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != sent:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return Shown("".join(texts), displays, error, time.monotonic() - began)
            if kind == "stream":
                texts.append(content["text"])
            elif kind in ("display_data", "execute_result", "update_display_data"):
                displays.append(content["data"])
            elif kind == "error":
                error = ANSI.sub("", "\n".join([f"{content['ename']}: {content['evalue']}", *content["traceback"]]))
            if interrupt_after and interrupt_after in "".join(texts) + str(displays):
                self.manager.interrupt_kernel()
                interrupt_after = ""
        raise TimeoutError(f"{code!r} took over {timeout} s: {texts} {displays}")

    def look(self) -> None:
        self.family |= {process.pid: process for process in descendants(self.process)}

    def ranks(self) -> list[psutil.Process]:
        "The processes that were forked for it."
        return [process for process in self.process.children(recursive=True) if process.parent() != self.process and is_rank(process)]

    def end(self) -> list[psutil.Process]:
        "End the kernel at once, and return what is left of all it has started."
        self.look()
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        _, left = psutil.wait_procs(self.family.values(), timeout=15)
        return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def is_rank(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ() or "forkserver" in " ".join(process.cmdline())
    except psutil.Error:
        return False
