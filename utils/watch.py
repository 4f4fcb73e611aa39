"""Notice that another process of a run has ended before its time, whatever this one is doing meanwhile.

Every process but the first keeps a connection to the first one open, over which nothing is said but a last word. The
operating system closes it with its process, however that ends, or once a machine has not answered for 40 seconds.
"""

import logging
import os
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

logger = logging.getLogger(__name__)

CONNECTION_TIME = 30.0  # seconds
GREETING = 16  # bytes
GREETING_TIME = 5.0  # seconds
LAST_WORD = b"."
# Of a silent connection, seconds: the first question after, the next ones, and how many stay unanswered at most.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
# How long a process that lost another leaves the word to that one, and to the launcher, which ends all.
DEFERENCE = 5.0  # seconds
LOST = "another process of the run has ended before its time: see its error"


class Watch:
    """Watches over connections in a thread, and ends this process `DEFERENCE` after another ended without a last word.

    Args:
        connections: to those watched over.
        server: where `expected` more processes will connect, with the greeting.
        greeting: what they say.
        expected: how many.
    """

    def __init__(
        self,
        connections: Sequence[socket.socket] = (),
        server: socket.socket | None = None,
        greeting: bytes = b"",
        expected: int = 0,
    ) -> None:
        self._server, self._greeting, self._expected = server, greeting, expected
        self._selector = selectors.DefaultSelector()
        self._connections = list(connections)
        self._closed, self._complete = Event(), Event()
        if server is None:
            self._complete.set()
        for connection in self._connections:
            self._selector.register(connection, selectors.EVENT_READ)
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ)
        Thread(target=self._run, daemon=True).start()

    def close(self, last_word: bool = True) -> None:
        """End the watch: with a last word, so that the others go on without this process, or leaving them to notice."""
        self._closed.set()
        self._complete.wait(GREETING_TIME)
        for connection in self._connections:
            with suppress(OSError):
                if last_word:
                    connection.sendall(LAST_WORD)
                connection.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._server:
                    self._welcome()
                elif not self._said_goodbye(key.fileobj):
                    self._end()
                    return
        self._selector.close()

    def _welcome(self) -> None:
        assert self._server is not None
        connection, _ = self._server.accept()
        connection.settimeout(GREETING_TIME)
        with suppress(OSError):
            if secrets.compare_digest(connection.recv(GREETING, socket.MSG_WAITALL), self._greeting):
                connection.settimeout(None)
                _keep_alive(connection)
                self._connections.append(connection)
                self._selector.register(connection, selectors.EVENT_READ)
                self._expected -= 1
        if connection not in self._connections:
            connection.close()
        if self._expected == 0:
            self._selector.unregister(self._server)
            self._server.close()
            self._complete.set()

    def _said_goodbye(self, connection: socket.socket) -> bool:
        self._selector.unregister(connection)
        word = b""
        with connection, suppress(OSError):
            word = connection.recv(1)
        return word == LAST_WORD

    def _end(self) -> None:
        if self._closed.is_set():
            return
        for connection in self._connections:  # so that the others notice too
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(DEFERENCE)
        if not self._closed.is_set():
            print(f"{Path(sys.argv[0]).name}: error: {LOST}", file=sys.stderr, flush=True)
            os._exit(2)  # the main thread may wait for ever, in what no exception reaches


def start_watch(
    host: str, first: bool, others: int, share: Callable[[tuple[int, bytes] | None], tuple[int, bytes]]
) -> Watch:
    """Watch over the other processes of a run; all of them call it.

    Args:
        host: name or address of the first one's machine.
        first: whether this is the first process.
        others: how many processes there are beside the first.
        share: gives what it is called with in the first process to all.
    """
    if first:
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
        greeting = secrets.token_bytes(GREETING)
        watch = Watch(server=server, greeting=greeting, expected=others)
        share((server.getsockname()[1], greeting))
        return watch
    port, greeting = share(None)
    try:
        connection = socket.create_connection((host, port), timeout=CONNECTION_TIME)
    except OSError as error:
        logger.warning("%s, port %d, cannot be reached (%s): a process that ends is noticed late", host, port, error)
        return Watch()
    connection.settimeout(None)
    _keep_alive(connection)
    connection.sendall(greeting)
    return Watch([connection])


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
