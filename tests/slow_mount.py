"""A folder mounted through FUSE, where each request that moves bytes, and each `close`, takes a while, as on a network.

The kernel's protocol is spoken directly (`linux/fuse.h`, `man 4 fuse`): no library is needed, only `/dev/fuse` and the right to mount.
`python slow_mount.py FOLDER MOUNT SECONDS` serves until its standard input ends."""

import ctypes
import errno
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PAGES = 256  # of a request, at most: 1 MiB
READ_AHEAD = 1 << 17  # bytes: Linux's default, also of NFS
ASYNC_READ, MAX_PAGES, BIG_WRITES = 1 << 0, 1 << 22, 1 << 5
libc = ctypes.CDLL(None, use_errno=True)


class Folder:
    "Answers the kernel's requests, by the files of a folder."

    def __init__(self, root: Path, seconds: float):
        self.paths, self.numbers, self.seconds = {1: root}, {root: 1}, seconds
        self.lock = threading.Lock()

    def attributes(self, path: Path) -> bytes:
        found = path.lstat()
        times = [int(moment) for moment in (found.st_atime, found.st_mtime, found.st_ctime)]
        sizes = (found.st_ino, found.st_size, found.st_blocks, *times)
        return struct.pack("<6Q10I", *sizes, 0, 0, 0, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, 1 << 20, 0)

    def entry(self, path: Path) -> bytes:
        attributes = self.attributes(path)
        with self.lock:
            number = self.numbers.setdefault(path, len(self.paths) + 1)
            self.paths[number] = path
        return struct.pack("<4Q2I", number, 0, 60, 60, 0, 0) + attributes

    def child(self, node: int, name: bytes) -> Path:
        return self.paths[node] / name.rstrip(b"\0").decode()

    def lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(self.child(node, body))

    def getattr(self, node: int, body: bytes = b"") -> bytes:
        return struct.pack("<Q2I", 60, 0, 0) + self.attributes(self.paths[node])

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<2I2Q", body)
        if valid & 1 << 3:
            os.truncate(self.paths[node], size)
        return self.getattr(node)

    def open(self, node: int, body: bytes) -> bytes:
        return struct.pack("<Q2I", os.open(self.paths[node], os.O_RDWR if os.access(self.paths[node], os.W_OK) else os.O_RDONLY), 0, 0)

    def create(self, node: int, body: bytes) -> bytes:
        _, mode = struct.unpack_from("<2I", body)
        path = self.child(node, body[16:])
        opened = os.open(path, os.O_RDWR | os.O_CREAT, mode & 0o777)
        return self.entry(path) + struct.pack("<Q2I", opened, 0, 0)

    def read(self, node: int, body: bytes) -> bytes:
        opened, offset, size = struct.unpack_from("<2QI", body)
        time.sleep(self.seconds)
        return os.pread(opened, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        opened, offset, size = struct.unpack_from("<2QI", body)
        time.sleep(self.seconds)
        return struct.pack("<2I", os.pwrite(opened, body[40 : 40 + size], offset), 0)

    def flush(self, node: int, body: bytes) -> bytes:
        "What `close` waits for."
        time.sleep(self.seconds)
        return b""

    def release(self, node: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def fsync(self, node: int, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def unlink(self, node: int, body: bytes) -> bytes:
        self.child(node, body).unlink()
        return b""

    def rename(self, node: int, body: bytes) -> bytes:
        return self._rename(node, body, 8)

    def rename2(self, node: int, body: bytes) -> bytes:
        return self._rename(node, body, 16)

    def _rename(self, node: int, body: bytes, header: int) -> bytes:
        old, new = body[header:].split(b"\0")[:2]
        before, after = self.child(node, old), self.child(struct.unpack_from("<Q", body)[0], new)
        before.rename(after)
        with self.lock:
            if (number := self.numbers.pop(before, None)) is not None:
                self.paths[number], self.numbers[after] = after, number
        return b""

    def statfs(self, node: int, body: bytes) -> bytes:
        found = os.statvfs(self.paths[node])
        counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<5Q10I", *counts, found.f_bsize, found.f_namemax, found.f_frsize, *[0] * 7)

    def opendir(self, node: int, body: bytes) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", body)
        answer = b""
        for number, name in enumerate(sorted(os.listdir(self.paths[node]))[offset:], offset + 1):
            text = name.encode()
            entry = struct.pack("<2Q2I", number, number, len(text), 0) + text + bytes(-len(text) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    def nothing(self, node: int, body: bytes) -> bytes:
        return b""

    def operations(self) -> dict[int, Callable[[int, bytes], bytes]]:
        "By the numbers of `enum fuse_opcode`."
        named = {1: "lookup", 3: "getattr", 4: "setattr", 10: "unlink", 12: "rename", 14: "open", 15: "read", 16: "write"}
        named |= {17: "statfs", 18: "release", 20: "fsync", 25: "flush", 27: "opendir", 28: "readdir", 29: "nothing"}
        named |= {30: "nothing", 34: "nothing", 35: "create", 45: "rename2"}
        return {number: getattr(self, name) for number, name in named.items()}


def serve(device: int, folder: Folder) -> None:
    "Answer requests until the folder is unmounted; several threads do it at once."
    operations = folder.operations()
    while True:
        try:
            request = os.read(device, (PAGES << 12) + 8192)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue
            return  # unmounted
        _, operation, unique, node = struct.unpack_from("<2I2Q", request)
        if operation in (2, 36, 42):  # forget, interrupt and batch_forget have no answer
            continue
        failed, answer = 0, b""
        try:
            answer = begin(request[40:]) if operation == 26 else operations[operation](node, request[40:])
        except KeyError:
            failed = errno.ENOSYS
        except OSError as error:
            failed = error.errno
        os.write(device, struct.pack("<IiQ", 16 + len(answer), -failed, unique) + answer)


def begin(body: bytes) -> bytes:
    "The answer to the first request: the protocol's version, and how large requests may be. Background requests are libfuse's 12."
    major, minor, ahead, offered = struct.unpack_from("<4I", body)
    flags = offered & (ASYNC_READ | MAX_PAGES | BIG_WRITES)
    return struct.pack("<4I2H2I2H8I", major, min(minor, 31), min(ahead, READ_AHEAD), flags, 12, 9, PAGES << 12, 1, PAGES, 0, *[0] * 8)


def main(root: str, mount: str, seconds: str) -> None:
    device, folder = os.open("/dev/fuse", os.O_RDWR), Folder(Path(root).absolute(), float(seconds))
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    if libc.mount(b"slow", mount.encode(), b"fuse", 6, options):  # MS_NOSUID | MS_NODEV
        sys.exit(f"It could not be mounted: {os.strerror(ctypes.get_errno())}.")
    for _ in range(64):
        threading.Thread(target=serve, args=(device, folder), daemon=True).start()
    print("mounted", flush=True)
    sys.stdin.read()
    libc.umount2(mount.encode(), 2)  # MNT_DETACH


@contextmanager
def slow_mount(
    root: Path,
    mount: Path,
    seconds: float,  # of each read, each write and each close
) -> Iterator[None]:
    "The folder, mounted slowly. Raises `OSError` where it cannot be."
    command = [sys.executable, __file__, str(root), str(mount), str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        if server.stdout.readline() != "mounted\n":
            raise OSError(server.stderr.read().strip())
        try:
            yield
        finally:
            server.stdin.close()
            server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
