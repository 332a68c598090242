"""The address of this node on the network of the run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915


def own_address() -> str:
    """Where other nodes of the run reach this one: the interface that gloo was told to use, else the one that the
    route to MASTER_ADDR takes, else what the host's name resolves to."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    master = os.environ.get("MASTER_ADDR", "")
    for find, name in ((_of_interface, interface), (_towards, master), (_towards, socket.gethostname())):
        with contextlib.suppress(OSError):
            return find(name)
    return "127.0.0.1"


def _of_interface(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])


def _towards(host: str) -> str:
    """The local end of the route to `host`; nothing is sent."""
    if not host:
        raise OSError("no host")
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
