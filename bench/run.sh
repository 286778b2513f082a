#!/bin/bash
# Build forkfs as it is released and measure it side by side with the alternatives, interleaved in one run.
#
# Usage: bench/run.sh [pause|files|stall|all] [--json FILE] [--csv FILE] [--branches N] [--sizes 512,1024,2048] [--quick]
#
#   pause    how long the guest stands still, what the branch costs; beside a stopped snapshot and QEMU's own
#   stall    how long the guest's writes wait meanwhile, as the guest itself sees it, and the throughput it loses
#   files    reading, copying, listing branches; beside files on tmpfs
#   --branches N   live branches of each kind (default 40); --sizes: guest memory in MiB, one guest at a time
#   --quick  8 branches, the smallest size: does it all work?
#
# Debian 12, root; missing packages are installed first. Figures are this machine's: nothing here passes or fails.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build-bench

"$root/tests/lib/packages.sh" build
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { { [ -f "$build/build.ninja" ] || meson setup "$build" "$root" --buildtype=release -Dbench=true; } && ninja -C "$build"; } >"$log" 2>&1; then
	cat "$log" >&2
	echo "bench/run.sh: $build does not build" >&2
	exit 1
fi

FORKFS_GUEST_KIT=$("$root/tests/guest/build.sh")
export FORKFS_GUEST_KIT
export FORKFS_BUILD=$build FORKFS_BIN=$build/tools/forkfs FORKFS_RELEASE_BIN=$build/tools/forkfs
export PYTHONPATH=$root/tests/lib:$root/bench/lib PYTHONDONTWRITEBYTECODE=1
rm -f "$log"
exec python3 -m forkfs_bench "$@"
