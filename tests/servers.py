"""Object-store servers for the tests: real ones, on loopback, installed by `make servers`, each for one session.

ceph     Ceph's RADOS gateway on a monitor and a storage daemon in memory: the reference
moto     fast, strict about conditions, accepts anything else
rclone   answers 200 to conditional puts and overwrites: the liar
azurite  Azure's blobs
gcs      an emulator of Google Cloud Storage, which overwrites as rclone does
swift    OpenStack's object store through its S3 interface: the weak one, in which several racing creators may win
"""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

INSTALLED = Path(sys.prefix) / "servers"
KEY, SECRET = "holdfast-key", "holdfast-secret"
SWIFT_KEY = "holdfast:key"  # account and user
DEADLINE_S = 60
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # of every Azurite
)


def s3_environment(endpoint: str, key: str = KEY) -> dict[str, str]:
    """What a client needs to reach a server of ours."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


def installed(*path: str) -> Path:
    """A program of a server; skips the test where it is not there."""
    found = INSTALLED.joinpath(*path)
    if not found.exists():
        pytest.skip(f"{found.name} is not installed here: run `make servers` (needs PyPI, Debian packages, npm)")
    return found


@contextmanager
def moto() -> Iterator[str]:
    with moto_process() as (endpoint, _):
        yield endpoint


@contextmanager
def moto_process() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The endpoint, and the process that may be frozen."""
    program, port = installed("python", "bin", "moto_server"), free_port()
    with running([str(program), "-H", "127.0.0.1", "-p", str(port)], port) as process:
        yield f"http://127.0.0.1:{port}", process


@contextmanager
def rclone() -> Iterator[str]:
    program, port = installed("python", "bin", "rclone"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bucket").mkdir()
        address = f"127.0.0.1:{port}"
        command = [str(program), "serve", "s3", "--addr", address, "--auth-key", f"{KEY},{SECRET}", folder]
        with running(command, port):
            yield f"http://{address}"


@contextmanager
def azurite() -> Iterator[str]:
    """Yields the connection string."""
    program, port = installed("npm", "node_modules", ".bin", "azurite-blob"), free_port()
    command = [str(program), "--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--blobHost", "127.0.0.1"]
    with tempfile.TemporaryDirectory() as folder, running([*command, "--blobPort", str(port)], port, cwd=folder):
        yield (
            f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{AZURE_ACCOUNT};"
        )


@contextmanager
def gcs() -> Iterator[str]:
    """Yields the endpoint; there is a bucket named `bucket`."""
    program, port = installed("gcs", "bin", "gcp-storage-emulator"), free_port()
    command = [str(program), "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--quiet"]
    with running([*command, "--default-bucket", "bucket"], port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def ceph() -> Iterator[str]:
    root = installed("ceph", "usr", "bin", "radosgw").parents[2]
    library = root / "usr/lib/x86_64-linux-gnu"
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="holdfast-ceph-"))
        stack.callback(shutil.rmtree, folder)
        monitor, gateway, run_id = free_port(), free_port(), str(uuid.uuid4())
        (folder / "ceph.conf").write_text(_ceph_conf(folder, library, monitor, gateway, run_id))
        environment = {
            "PATH": "/usr/bin:/bin",
            "CEPH_CONF": str(folder / "ceph.conf"),
            "LD_LIBRARY_PATH": f"{library}:{library}/ceph:{root}/lib/x86_64-linux-gnu",
            "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
        }

        def run(program: str, *arguments: str) -> None:
            command = [str(root / "usr/bin" / program), *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
            assert not done.returncode, f"{program}: {done.stderr[-2000:]}"

        def start(program: str, *arguments: str, port: int = 0) -> None:
            stack.enter_context(running([str(root / "usr/bin" / program), "-f", *arguments], port, environment))

        address = f"[v2:127.0.0.1:{monitor}]"
        run("monmaptool", "--create", "--addv", "a", address, "--fsid", run_id, str(folder / "monmap"))
        for name in ("mon", "osd"):
            (folder / name).mkdir()
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))
        start("ceph-mon", "-i", "a", port=monitor)
        disk = str(uuid.uuid4())
        run("ceph", "osd", "new", disk)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        start("ceph-osd", "-i", "0")
        start("radosgw", "-n", "client.rgw", port=gateway)
        run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test",
            f"--access-key={KEY}", f"--secret={SECRET}")  # fmt: skip
        yield f"http://127.0.0.1:{gateway}"


def _ceph_conf(folder: Path, library: Path, monitor: int, gateway: int, run_id: str) -> str:
    return f"""
[global]
fsid = {run_id}
mon host = [v2:127.0.0.1:{monitor}]
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
mon max pg per osd = 1000
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 2147483648
osd class dir = {library}/rados-classes
plugin dir = {library}/ceph
erasure code dir = {library}/ceph/erasure-code
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
mon data = {folder}/mon
osd data = {folder}/osd
public addr = 127.0.0.1
cluster addr = 127.0.0.1
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


SWIFT = {
    "account": "swift.account.server",
    "container": "swift.container.server",
    "object": "swift.obj.server",
    "proxy": "swift.proxy.server",
}
SWIFT_RINGS = """
import sys
from swift.common.ring import RingBuilder

for name, port in zip(("account", "container", "object"), sys.argv[2:]):
    ring = RingBuilder(1, 1, 1)
    ring.add_dev(dict(id=0, region=1, zone=1, ip="127.0.0.1", port=int(port), device="disk", weight=1.0))
    ring.rebalance()
    ring.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""
SWIFT_SERVER = """
import importlib, sys
import swift.common.utils

swift.common.utils.SWIFT_CONF_FILE = sys.argv[1]
server = importlib.import_module(sys.argv[2])
sys.argv = sys.argv[2:]
server.main()
"""


@contextmanager
def swift() -> Iterator[str]:
    """Needs a folder for temporary files whose file system has extended attributes."""
    python = str(installed("swift", "bin", "python"))
    ports = {name: free_port() for name in SWIFT}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (folder / "disks" / "disk").mkdir(parents=True)
        (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = holdfast\n")
        rings = [python, "-c", SWIFT_RINGS, str(folder), *(str(ports[name]) for name in SWIFT if name != "proxy")]
        subprocess.run(rings, check=True, capture_output=True, timeout=DEADLINE_S)
        for name, module in SWIFT.items():
            path = folder / f"{name}.conf"
            path.write_text(_swift_conf(folder, name, ports[name]))
            command = [python, "-c", SWIFT_SERVER, str(folder / "swift.conf"), module, str(path)]
            stack.enter_context(running(command, ports[name]))
        yield f"http://127.0.0.1:{ports['proxy']}"


def _swift_conf(folder: Path, name: str, port: int) -> str:
    common = f"""
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {getpass.getuser()}
swift_dir = {folder}
devices = {folder}/disks
mount_check = false
disable_fallocate = true
log_level = ERROR
[app:{name}-server]
use = egg:swift#{name}
"""
    if name != "proxy":
        return f"{common}[pipeline:main]\npipeline = {name}-server\n"
    account, user = SWIFT_KEY.split(":")
    return f"""{common}
account_autocreate = true
[pipeline:main]
pipeline = catch_errors cache listing_formats bulk s3api tempauth slo proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:9
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{user} = {SECRET} .admin
[filter:slo]
use = egg:swift#slo
"""


@contextmanager
def running(
    command: Sequence[str], port: int = 0, environment: dict[str, str] | None = None, cwd: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the context lasts; where it has a `port`, entered once that takes connections."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=cwd)
        try:
            deadline = time.monotonic() + DEADLINE_S
            while port and not _listens(port):
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{command[0]} does not answer: {output.read()[-2000:].decode()}")
                time.sleep(0.02)
            yield process
        finally:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
