#!/bin/bash
# Install, on Debian 12, what building and testing needs and what is not there yet. Never reinstalls anything.
#
# Usage: packages.sh [build|test]      build: to build and run the quick start; test (default): everything
set -euo pipefail

packages=(meson ninja-build pkg-config gcc libc6-dev libfuse3-dev fuse3 libxxhash-dev liblz4-dev libjson-c-dev
	qemu-system-x86 cpio xz-utils python3)
case ${1:-test} in
build) ;;
test) packages+=(curl libcmocka-dev gdb rsync e2fsprogs xfsprogs btrfs-progs) ;;
*)
	echo "packages.sh: build or test, not '$1'" >&2
	exit 2
	;;
esac

missing=()
for p in "${packages[@]}"; do
	if [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" != installed ]; then
		missing+=("$p")
	fi
done
if [ ${#missing[@]} -eq 0 ]; then
	exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
	echo "packages.sh: these packages are missing and only root can install them: ${missing[*]}" >&2
	echo "packages.sh: run 'apt-get install ${missing[*]}' as root, then this again" >&2
	exit 1
fi
echo "installing: ${missing[*]}"
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
