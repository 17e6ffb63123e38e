# SPDX-License-Identifier: Apache-2.0
"""The processes of a run find each other before jax connects them.

jax's own client aborts the process, with a C++ stack, if the coordinator is not reachable or a
process does not arrive. Here both are one line that names them.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from jaxllm.errors import UserError

LONGEST = 4096  # bytes of a message


def meet(address: str, processes: int, index: int, timeout: float) -> None:
    """Returns in every process once all of them have reached `address` (host:port).

    Process 0 listens there; jax's coordinator takes the port over afterwards. timeout: seconds.
    Raises UserError, in every process that arrived, that names those that did not, and processes
    with the same index or another number of processes; and if the address cannot be reached.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"the coordinator's address is {address!r}; it must be HOST:PORT")
    hello = {"index": index, "processes": processes, "host": socket.gethostname()}
    end = time.monotonic() + timeout
    if index == 0:
        problem = _host(int(port), hello, end)
    else:
        problem = _visit(host, int(port), hello, end, timeout)
    if problem:
        raise UserError(problem)


def _host(port: int, hello: dict[str, Any], end: float) -> str:
    """Waits for the others, and sends each the verdict: the problem, or ""."""
    try:
        server = _listen(port)
    except OSError as error:
        return f"process 0 cannot listen on port {port} ({error.strerror}); choose another"
    processes, here = hello["processes"], hello["host"]
    visitors: list[tuple[int, str, socket.socket]] = []  # (index, host, connection)
    problem = ""
    with server:
        while not problem:
            visitors = [one for one in visitors if not _is_closed(one[2])]  # it may start again
            present = {0: here} | {index: host for index, host, _ in visitors}
            if len(present) == processes:
                break
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                visitor, _ = server.accept()
            except TimeoutError:
                problem = _missing(present, processes)
                break
            visitor.settimeout(5.0)
            try:
                theirs = json.loads(visitor.makefile("rb").readline(LONGEST))
                index, count, host = theirs["index"], theirs["processes"], theirs["host"]
            except (OSError, ValueError, KeyError, TypeError):
                visitor.close()  # not a process of a run
                continue
            if count != processes:
                problem = f"process {index} ({host}) was started as one of {count} processes, "
                problem += f"process 0 ({here}) as one of {processes}"
            elif index == 0 or any(i == index and not _is_closed(c) for i, _, c in visitors):
                problem = f"two processes have index {index}: on {present[index]} and on {host}"
            visitors.append((index, host, visitor))
        for _, _, visitor in visitors:
            try:
                visitor.settimeout(5.0)
                visitor.sendall(json.dumps(problem).encode() + b"\n")
                visitor.recv(1)  # the visitor closes first, so the port is free at once
            except OSError:
                pass
            visitor.close()
    return problem


def _is_closed(connection: socket.socket) -> bool:
    """True if the other end is gone; it sends nothing else."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _missing(present: dict[int, str], count: int) -> str:
    missing = [i for i in range(count) if i not in present]
    names = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
    hosts = ", ".join(f"{i} ({present[i]})" for i in sorted(present)[:4])
    word = "process" if len(missing) == 1 else "processes"
    return (
        f"{word} {names} of {count} did not arrive within cluster.timeout; here are {hosts}: look "
        "at the log of the missing ones"
    )


def _visit(host: str, port: int, hello: dict[str, Any], end: float, timeout: float) -> str:
    """Tells process 0 that this one is there, and returns its verdict.

    end: of the attempts to reach process 0, which may have begun to wait later than this one.
    """
    reason = ""
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5.0)) as server:
                server.sendall(json.dumps(hello).encode() + b"\n")
                server.settimeout(timeout + 5.0)
                return json.loads(server.makefile("rb").readline(LONGEST))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            time.sleep(min(0.2, max(left, 0)))
    return (
        f"process {hello['index']} ({hello['host']}) could not reach the coordinator {host}:{port} "
        f"within cluster.timeout ({reason}); check that process 0 runs there and that the port is "
        "open"
    )
