"""A kernel as Jupyter starts one, with what its cells show."""

import time
from pathlib import Path
from queue import Empty

from jupyter_client import KernelManager
from warm import warm_python


class Kernel:
    "A kernel in a folder. It starts at once, in a process group of its own, as Jupyter's do."

    def __init__(self, folder: Path):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.kernel_spec.argv[0] = warm_python()
        self.manager.start_kernel(cwd=str(folder))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def start(self, code: str) -> str:
        "Execute a cell without waiting for it; its number."
        return self.client.execute(code)

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
