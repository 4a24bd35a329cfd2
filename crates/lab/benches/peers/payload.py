#!/usr/bin/env python3
"""Measures how fast pieces of stored keys and values are read by other means: pread of a plain file, and Redis.

FOLDER holds case.json, pieces.bin and order.i32; README.md says what is in them. The pieces of one batch are read into
memory that is there already. The time is that of a batch, with the calls from Python. Prints one JSON object per peer
and setting, or {"peer", "skipped"} where a peer cannot be measured.
"""

from __future__ import annotations

import array
import json
import os
import pathlib
import platform
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

READERS = 8
BATCHES_MIN = 10
REPLY_SECONDS_MAX = 30
START_SECONDS_MAX = 10
# Sets sent before their replies are read: few enough that neither side's socket buffer fills up.
SETS_IN_FLIGHT = 32


class Skip(Exception):
    """Why a peer cannot be measured here."""


def log(message: str) -> None:
    print(f"payload.py: {message}", file=sys.stderr, flush=True)


def emit(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def percentile(times_us: list[float], share: float) -> float:
    """As landmarkdb's own figures are taken: the nearest measured time."""
    return round(sorted(times_us)[int((len(times_us) - 1) * share + 0.5)], 1)


class Case:
    """Which pieces are read, and in which order."""

    def __init__(self, folder: pathlib.Path) -> None:
        case = json.loads((folder / "case.json").read_text())
        self.piece_bytes: int = case["piece_bytes"]
        self.pieces: int = case["pieces"]
        self.seconds: float = case["seconds"]
        self.peers: list[str] = case["peers"]
        self.file = folder / "pieces.bin"
        order = array.array("i", (folder / "order.i32").read_bytes())
        if sys.byteorder == "big":
            order.byteswap()
        batch: int = case["batch"]
        self.batches = [order[at : at + batch].tolist() for at in range(0, case["batches"] * batch, batch)]
        self.bytes_per_batch = batch * self.piece_bytes

    def measure(
        self,
        read: Callable[[list[int]], None],
        before: Callable[[], None] = lambda: None,
        **fields: Any,
    ) -> None:
        """Time read alone, per batch, with what comes before it left out."""
        times_us: list[float] = []
        deadline = time.perf_counter() + self.seconds
        for pieces in self.batches:
            if len(times_us) >= BATCHES_MIN and time.perf_counter() > deadline:
                break
            before()
            started = time.perf_counter_ns()
            read(pieces)
            times_us.append((time.perf_counter_ns() - started) / 1000)
        fields |= {"p50_us": percentile(times_us, 0.5), "p99_us": percentile(times_us, 0.99)}
        emit(**fields, batches=len(times_us), bytes_per_batch=self.bytes_per_batch)


class File:
    """The pieces in a plain file, read by one thread or by several."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case = case
        self.descriptor = os.open(case.file, os.O_RDONLY)
        os.fsync(self.descriptor)  # Only pages that are on disk leave the page cache when told to.
        self.buffers = [bytearray(case.piece_bytes) for _ in case.batches[0]]
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        os.close(self.descriptor)

    def warm(self) -> None:
        for piece in range(self.case.pieces):
            self.read([piece])

    def cool(self) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_share(self, pieces: list[int], first: int, step: int) -> None:
        piece_bytes = self.case.piece_bytes
        for piece, buffer in zip(pieces[first::step], self.buffers[first::step]):
            if os.preadv(self.descriptor, [buffer], piece * piece_bytes) != piece_bytes:
                raise OSError(f"piece {piece} was not read in one go")

    def read(self, pieces: list[int]) -> None:
        if self.threads == 1:
            self.read_share(pieces, 0, 1)
            return
        shares = [self.pool.submit(self.read_share, pieces, first, self.threads) for first in range(self.threads)]
        for share in shares:
            share.result()


def pread_warm(case: Case, peer: str) -> None:
    with File(case, 1) as file:
        file.warm()
        case.measure(file.read, peer=peer, version=platform.release(), setting="page cache", threads=1)


def pread_cold(case: Case, peer: str) -> None:
    for threads in (1, READERS):
        blocks_before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        with File(case, threads) as file:
            case.measure(file.read, file.cool, peer=peer, version=platform.release(), setting="disk", threads=threads)
        if resource.getrusage(resource.RUSAGE_SELF).ru_inblock == blocks_before:
            log("nothing was read from a disk: this file system may keep the file in memory whatever it is told")


class Redis:
    """A connection that speaks as much of Redis's protocol as is measured. A batch's reply has a known size, so it is
    received in one piece and nothing is parsed: no client is faster."""

    def __init__(self, case: Case, address: str | tuple[str, int]) -> None:
        unix = isinstance(address, str)
        self.socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self.socket.connect(address)
        # The kernel's own time limit: Python's would cost a poll per read.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", REPLY_SECONDS_MAX, 0))
        if not unix:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.case = case
        self.reply = bytearray(len(self.command(*[bytes(case.piece_bytes)] * len(case.batches[0]))))

    @staticmethod
    def command(*words: bytes) -> bytes:
        """A list of strings, which looks the same in a reply."""
        return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)

    def receive(self, into: memoryview) -> None:
        while into:
            received = self.socket.recv_into(into, 0, socket.MSG_WAITALL)
            if received == 0:
                raise ConnectionError("redis-server closed the connection")
            into = into[received:]

    def load(self) -> None:
        replies = bytearray(len(b"+OK\r\n") * SETS_IN_FLIGHT)
        with self.case.file.open("rb") as file:
            for first in range(0, self.case.pieces, SETS_IN_FLIGHT):
                pieces = range(first, min(first + SETS_IN_FLIGHT, self.case.pieces))
                for piece in pieces:
                    self.socket.sendall(self.command(b"SET", b"%d" % piece, file.read(self.case.piece_bytes)))
                received = memoryview(replies)[: len(pieces) * len(b"+OK\r\n")]
                self.receive(received)
                if received != b"+OK\r\n" * len(pieces):
                    raise ConnectionError(f"redis-server refused a piece: {bytes(received)!r}")

    def mget(self, pieces: list[int]) -> None:
        self.socket.sendall(self.command(b"MGET", *(b"%d" % piece for piece in pieces)))
        self.receive(memoryview(self.reply))

    def check(self, pieces: list[int]) -> None:
        self.mget(pieces)
        size = self.case.piece_bytes
        with self.case.file.open("rb") as file:
            expected = self.command(*(os.pread(file.fileno(), size, piece * size) for piece in pieces))
        if self.reply != expected:
            raise ConnectionError(f"redis-server answered {bytes(self.reply[:64])!r}...")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def redis(case: Case, peer: str) -> None:
    program = shutil.which("redis-server")
    if program is None:
        raise Skip("redis-server is not installed: apt-get install redis-server")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = version.partition("v=")[2].partition(" ")[0]
    with tempfile.TemporaryDirectory(prefix="landmarkdb-bench-") as folder:
        path, diary, port = f"{folder}/redis.sock", pathlib.Path(folder, "redis.log"), free_port()
        options = f"--bind 127.0.0.1 --port {port} --unixsocket {path} --dir {folder} --logfile {diary} --appendonly no"
        server = subprocess.Popen([program, *options.split(), "--save", ""], stdout=sys.stderr)
        try:
            deadline = time.monotonic() + START_SECONDS_MAX
            while not os.path.exists(path):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise ConnectionError(f"redis-server did not start: {diary.read_text() if diary.exists() else ''}")
                time.sleep(0.01)
            Redis(case, path).load()
            for setting, address in (("TCP loopback", ("127.0.0.1", port)), ("Unix socket", path)):
                client = Redis(case, address)
                client.check(case.batches[0])
                case.measure(client.mget, peer=peer, version=version, setting=f"MGET, {setting}", threads=1)
        finally:
            server.terminate()
            server.wait()


PEERS = {"pread-warm": pread_warm, "pread-cold": pread_cold, "redis": redis}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: payload.py FOLDER")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Stops the server too.
    case = Case(pathlib.Path(sys.argv[1]))
    for peer in case.peers:
        try:
            if peer not in PEERS:
                raise Skip(f"not a peer of this script, which knows {', '.join(PEERS)}")
            PEERS[peer](case, peer)
        except Skip as reason:
            emit(peer=peer, skipped=str(reason))
        except Exception as error:  # One peer's failure is no reason to lose the others.
            traceback.print_exc()
            emit(peer=peer, skipped=f"failed: {error!r}")


if __name__ == "__main__":
    main()
