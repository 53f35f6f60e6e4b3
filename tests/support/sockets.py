"""What this process has sent over TCP, connection by connection, as the kernel counts it."""

import os
import socket
import struct

_SENT = 200  # where tcpi_bytes_sent stands in struct tcp_info, and after it tcpi_bytes_retrans (Linux 4.19)


def kernel_counts() -> bool:
    with socket.socket() as own:
        return len(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)) >= _SENT + 16


def sent() -> dict[str, int]:
    """Bytes sent over each open connection so far, without those sent again."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = os.readlink(f"/proc/self/fd/{name}")
            if connection.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as own:
                    info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, again = struct.unpack_from("<QQ", info, _SENT)
                found[connection] = sent - again
        except OSError:  # closed since it was listed, or no TCP
            continue
    return found
