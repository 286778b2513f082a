#!/bin/bash
# Build forkfs as it is released and measure it side by side with the alternatives, interleaved in one run.
#
# Usage: bench/run.sh [pause|sizes|capture|stall|files|store|restore|pool|fork|agent|scan|all] [--json FILE] [--csv FILE] [--branches N] [--sizes 512,1024,…] [--guest microvm|firecracker|qemu] [--quick]
#
#   pause    how long the guest stands still, what the branch costs; beside a stopped snapshot, arming in the pause and QEMU's own
#   sizes    the pause and every kind of branch by the size of the memory, 0.5 to 16 GiB, on the microVM of tests/microvm (KVM), and up to 4 GiB on a Firecracker
#            (FIRECRACKER=PATH, or in PATH)
#   capture  the copying beside memcpy, what a second branch costs with tracking, what the caller waits
#   stall    how long the guest's writes wait meanwhile, as the guest itself sees it, and the throughput it loses; beside one lock and QEMU's own
#   files    reading, copying, listing branches; beside files on tmpfs
#   store    writing branches to a store and reading them; beside lz4, zstd, cp
#   restore  children of settled branches and of ones in flight, one and many: until they run, their memory; beside files on tmpfs
#   fork     forks: until the guest has its payload, until it has acknowledged, a hundred with payloads of their own; the search for mailboxes in 4 GiB
#   agent    children until the agent in their guest is healthy and a first command has run, by phase; ten commands side by side; a cold boot
#   pool     a child from a warm pool, idle or restored for who asks, beside forkfs restore; what an idle one takes
#   scan     the look for other writers of guest memory before each branch, with 2,000 processes: by the kernel, and in /proc
#   --branches N   live branches of each kind (default 12); --sizes: guest memory in MiB, one guest at a time (each has its own default)
#   --guest      of sizes: this VMM alone
#   --csv    every sample; --json: with their spread and the machine
#   --quick  4 branches, the smallest size: does it all work?
#
# Debian 12, root; missing packages are installed first. Figures are this machine's: nothing here passes or fails.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build-bench

"$root/tests/lib/packages.sh" build
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# build DIR TARGET… -- MESON-OPTIONS…: configured once, built each time; its output is shown only when it fails.
build() {
	local dir=$1 targets=()
	shift
	while [ "$1" != -- ]; do
		targets+=("$1")
		shift
	done
	shift
	if ! { { [ -f "$dir/build.ninja" ] || meson setup "$dir" "$root" --buildtype=release "$@"; } && ninja -C "$dir" "${targets[@]}"; } >"$log" 2>&1; then
		cat "$log" >&2
		echo "bench/run.sh: $dir does not build" >&2
		exit 1
	fi
}
build "$build" -- -Dbench=true
# the same engine going about it in other ways, which only a build with fault points can
build "$build/alternatives" tools/forkfs -- -Dfaults=true

FORKFS_GUEST_KIT=$("$root/tests/guest/build.sh")
export FORKFS_GUEST_KIT
export FORKFS_ALTERNATIVES_BIN=$build/alternatives/tools/forkfs
export FORKFS_BUILD=$build FORKFS_BIN=$build/tools/forkfs FORKFS_RELEASE_BIN=$build/tools/forkfs
export PYTHONPATH=$root/tests/lib:$root/bench/lib PYTHONDONTWRITEBYTECODE=1
rm -f "$log"
exec python3 -m forkfs_bench "$@"
