"""What a process has sent over TCP, by the kernel's own counters: no root, no packet capture."""

import os
import socket
import struct
import sys
from contextlib import suppress

# Places in Linux's struct tcp_info (include/uapi/linux/tcp.h), which only ever grows at its end.
_SIZE = 216
_NOT_SENT = struct.Struct("=I"), 144
_SENT_AND_AGAIN = struct.Struct("=QQ"), 200


def bytes_sent() -> int:
    """Bytes that this process has written to its open TCP connections since they were made.

    What was sent again after a loss counts once; what waits in the kernel's buffers counts. Headers
    of TCP and IP do not. A connection that was closed in between takes its bytes with it.

    Raises:
        RuntimeError: the system has no such counters (they came with Linux 4.19).
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"TCP counters need Linux, not {sys.platform}")
    total = 0
    for name in os.listdir("/proc/self/fd"):
        # The folder's own descriptor is closed by now, and other threads close theirs.
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    total += _of(connection)
    return total


def _of(connection: socket.socket) -> int:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    if connection.type != socket.SOCK_STREAM:
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    if len(info) < _SIZE:
        raise RuntimeError(f"this kernel's tcp_info has {len(info)} bytes, expected {_SIZE}")
    (waiting,) = _NOT_SENT[0].unpack_from(info, _NOT_SENT[1])
    sent, again = _SENT_AND_AGAIN[0].unpack_from(info, _SENT_AND_AGAIN[1])
    return sent - again + waiting
