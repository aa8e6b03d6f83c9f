"""A kernel as Jupyter starts one, with what its cells show."""

import re
import tempfile
import time
from pathlib import Path
from queue import Empty
from typing import NamedTuple

import psutil
from jupyter_client import KernelManager
from warm import descendants, left_of, warm_python

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Kernel:
    "A kernel in a folder. It starts at once, in a process group of its own, as Jupyter's do."

    def __init__(self, folder: Path):
        self.sockets = tempfile.TemporaryDirectory()  # of which no other process takes one first, as it may with a free port
        self.manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{self.sockets.name}/kernel")
        self.manager.kernel_spec.argv[0] = warm_python()
        self.manager.start_kernel(cwd=str(folder))
        self.connect()

    def connect(self) -> None:
        "As a page that is opened does."
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=90)

    def start(self, code: str, **options) -> str:
        "Execute a cell without waiting for it; its number."
        return self.client.execute(code, **options)

    def messages(self, cell: str, timeout: float = 120):
        "What a cell sends, until it has ended."
        deadline = time.monotonic() + timeout
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except Empty:
                assert time.monotonic() < deadline, "the cell has not ended"
                continue
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return
            yield message["msg_type"], message["content"]

    def run(self, code: str, timeout: float = 120) -> str:
        "Execute a cell; what it has printed and shown, the last state of each display, and its error."
        printed, displays, error = "", {}, ""
        for kind, content in self.messages(self.start(code), timeout):
            if kind == "stream":
                printed += content["text"]
            elif kind in ("display_data", "update_display_data", "execute_result"):
                displays[content.get("transient", {}).get("display_id") or len(displays)] = content["data"].get("text/plain", "")
            elif kind == "error":
                error = f"{content['ename']}: {content['evalue']}"
        return "\n".join([printed, *displays.values(), error])

    def interrupt(self) -> None:
        "Jupyter's Stop button."
        self.manager.interrupt_kernel()

    def kill(self) -> None:
        "End it as Jupyter does: its whole process group, at once."
        self.client.stop_channels()
        if self.manager.is_alive():
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()
        self.sockets.cleanup()


class Shown(NamedTuple):
    "What a cell has shown."

    text: str  # that was printed
    displays: list[dict]  # by MIME type, updates among them
    error: str  # its name, its sentence and its traceback; empty where it has none

    @property
    def value(self) -> str:
        return self.displays[-1]["text/plain"]


class FamilyKernel(Kernel):
    "A kernel of whose processes none may be left."

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.process = psutil.Process(self.manager.provisioner.process.pid)
        self.family: dict[int, psutil.Process] = {}

    def run(self, code: str, timeout: float = 120, interrupt_after: str = "") -> Shown:
        "Execute a cell; press Stop when its output has that text."
        texts, displays, error = [], [], ""
        for kind, content in self.messages(self.start(code), timeout):
            self.look()
            if kind == "stream":
                texts.append(content["text"])
            elif kind in ("display_data", "execute_result", "update_display_data"):
                displays.append(content["data"])
            elif kind == "error":
                error = ANSI.sub("", "\n".join([f"{content['ename']}: {content['evalue']}", *content["traceback"]]))
            if interrupt_after and interrupt_after in "".join(texts) + str(displays):
                self.interrupt()
                interrupt_after = ""
        return Shown("".join(texts), displays, error)

    def look(self) -> None:
        self.family |= {process.pid: process for process in descendants(self.process)}

    def end(self, within: float = 15) -> list[psutil.Process]:
        "End the kernel at once, and return what is left of all it has started, so many seconds later."
        self.look()
        self.kill()
        return left_of(self.family.values, within)
