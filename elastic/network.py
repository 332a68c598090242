"""The addresses of this node, and the interface that the workers' gloo is to use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

from ckpt.keeper.address import own_address

_SIOCGIFADDR = 0x8915
_ROUTE_PROBE = "198.51.100.1"  # a documentation address: nothing is sent, only the route is asked for


def addresses(given: str) -> tuple[str, ...]:
    """Where other agents reach this one, the best first; just `given` if it is.

    Sets GLOO_SOCKET_IFNAME to the interface of the best one if it is unset: gloo takes 127.0.0.1 otherwise where the
    host's name leads there.
    """
    by_interface = interfaces()
    best = given or _best(by_interface)
    name = next((name for name, address in by_interface.items() if address == best), None)
    if name is not None and not os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    if given or best.startswith("127."):
        return (best,)
    others = [address for address in by_interface.values() if address != best and not address.startswith("127.")]
    return (best, *others)


def interfaces() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    return found


def _best(by_interface: dict[str, str]) -> str:
    """The interface that gloo was told to use, else that of the default route, else any that is no loopback."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return own_address()
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_ROUTE_PROBE, 9))
        return str(probe.getsockname()[0])
    return next((a for a in by_interface.values() if not a.startswith("127.")), "127.0.0.1")
