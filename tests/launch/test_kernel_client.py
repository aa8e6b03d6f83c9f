"""The wait for a cell's last outputs."""

import asyncio
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from dlnb.launch.kernel_client import _LastOutputs

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("is_sent", [True, False], ids=["an output that has come meanwhile is taken", "silence is silence"])
def test_a_process_that_was_held_up_looks_at_what_has_come_before_it_gives_up(is_sent):
    "It is held up, as by a slow disk, for longer than it waits for an output."

    async def wait_for_outputs() -> str:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        client, loop = SimpleNamespace(messages=0, silence=0.3, iopub_timeout=0), asyncio.get_running_loop()

        async def outputs() -> str:
            for _ in range(3):  # a message is several parts, and more than one task takes it
                await loop.sock_recv(ours, 1)
                await asyncio.sleep(0)
            client.messages += 1
            return "the last output"

        with ours, theirs:
            last = asyncio.ensure_future(outputs())
            loop.call_later(0.1, time.sleep, 0.6)
            if is_sent:
                threading.Timer(0.4, theirs.send, (b"...",)).start()
            await _LastOutputs(client, last)
            return last.result()

    if is_sent:
        assert asyncio.run(wait_for_outputs()) == "the last output"
    else:
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(wait_for_outputs())
