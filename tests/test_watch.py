"""Processes that watch over each other: whichever ends without a last word, the others end too, busy as they are."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from utils import watch
from utils.watch import LOST, start_watch

pytestmark = pytest.mark.slow

COLLECTIVE_TIMEOUT = 30  # seconds; they take one
PROGRAM = """
import json, os, sys, time
from pathlib import Path
from utils import watch

watch.DEFERENCE = 0.5
rank, count, meet, seconds = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])

def share(value):
    if value:
        Path(f"{meet}.tmp").write_text(json.dumps([value[0], value[1].hex()]))
        os.replace(f"{meet}.tmp", meet)
        return value
    while not meet.exists():
        time.sleep(0.01)
    port, greeting = json.loads(meet.read_text())
    return port, bytes.fromhex(greeting)

watching = watch.start_watch("localhost", rank == 0, count - 1, share)
print("there", flush=True)
time.sleep(seconds)
watching.close()
time.sleep(2)  # beyond what a lost process would leave
"""


def start(meet: Path, count: int, seconds: float) -> "list[subprocess.Popen[str]]":
    """So many processes, which have found each other and are busy for so long."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(count), str(meet), str(seconds)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
    time.sleep(0.5)  # for the first to have welcomed the last
    return processes


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_a_process_ends_the_others(tmp_path: Path, lost: int, end: signal.Signals) -> None:
    processes = start(tmp_path / "meet", 3, seconds=600)
    processes[lost].send_signal(end)
    for rank, process in enumerate(processes):
        _, said = process.communicate(timeout=COLLECTIVE_TIMEOUT)
        assert process.returncode == (-end if rank == lost else 2)
        assert said == ("" if rank == lost else f"-c: error: {LOST}\n")


def test_processes_that_are_done_end_as_they_like(tmp_path: Path) -> None:
    """The first one long before the others, which work on without it."""
    first, *others = start(tmp_path / "meet", 3, seconds=0.5)
    for process in (first, *others):
        assert process.communicate(timeout=COLLECTIVE_TIMEOUT) == ("", "")
        assert process.returncode == 0


def test_a_stranger_is_not_watched_over(tmp_path: Path) -> None:
    told: list[tuple[int, bytes]] = []

    def share(value: tuple[int, bytes] | None) -> tuple[int, bytes]:
        assert value is not None
        told.append(value)
        return value

    first = start_watch("localhost", True, 1, share)
    ((port, greeting),) = told
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(bytes(len(greeting)))
        assert stranger.recv(1) == b""  # sent away
    second = start_watch("localhost", False, 1, lambda _: (port, greeting))
    assert first._complete.wait(COLLECTIVE_TIMEOUT)
    assert len(first._connections) == 1
    second.close()
    first.close()


def test_a_first_process_out_of_reach_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    start_watch("localhost", False, 1, lambda _: (port, b"")).close()
    assert "cannot be reached" in caplog.text
    assert watch.CONNECTION_TIME < 60
