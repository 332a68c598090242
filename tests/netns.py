"""Nodes on a network of their own: a namespace each, veth pairs to a bridge, links that can be cut without a word.

Needs root. Everything is made in namespaces with names of this process, and removed with them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


@dataclass
class Network:
    """A bridge in a namespace of its own, and the nodes on it."""

    prefix: str
    nodes: list[str] = field(default_factory=list)

    @property
    def hub(self) -> str:
        return f"{self.prefix}-hub"

    def add(self, name: str) -> list[str]:
        """A node with eth0; what stands before a command that runs on it."""
        node, port = f"{self.prefix}-{name}", f"to-{name}"
        ip("netns", "add", node)
        self.nodes.append(node)
        ip("-n", node, "link", "set", "lo", "up")
        ip("-n", self.hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", node)
        ip("-n", self.hub, "link", "set", port, "master", "br0", "up")
        ip("-n", node, "addr", "add", f"10.231.77.{len(self.nodes)}/24", "dev", "eth0")
        ip("-n", node, "link", "set", "eth0", "up")
        return ["ip", "netns", "exec", node]

    def cut(self, name: str) -> None:
        """Nothing arrives any more, and neither end is told: the port leaves the bridge, the carrier stays."""
        ip("-n", self.hub, "link", "set", f"to-{name}", "nomaster")

    def heal(self, name: str) -> None:
        ip("-n", self.hub, "link", "set", f"to-{name}", "master", "br0")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    made = Network(f"hf-{uuid.uuid4().hex[:6]}")
    try:
        ip("netns", "add", made.hub)
        ip("-n", made.hub, "link", "add", "br0", "type", "bridge")
        ip("-n", made.hub, "link", "set", "br0", "up")
        yield made
    finally:
        remove([*made.nodes, made.hub])


def remove(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=30)
