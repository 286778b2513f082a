#!/bin/bash
# Build forkfs twice (for tests, and as it is released) and run all its tests.
#
# Usage: tests/run.sh [-k PATTERN] [-j N] [--list] [--long]
#
# FORKFS_TEST_BUILD=DIR runs the daemon and the command of another build directory, one with a sanitizer say.
#
# Missing packages are installed first (Debian 12, root). The last line counts: N passed, N failed, N skipped.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build-tests
release=$root/build-release

"$root/tests/lib/packages.sh" test

# build DIR MESON-OPTIONS…: configured once, built each time; its output is shown only when it fails.
build() {
	local dir=$1 log
	shift
	log=$(mktemp)
	if ! { { [ -f "$dir/build.ninja" ] || meson setup "$dir" "$root" -Dwerror=true "$@"; } && ninja -C "$dir"; } >"$log" 2>&1; then
		cat "$log" >&2
		rm -f "$log"
		echo "tests/run.sh: $dir does not build" >&2
		exit 1
	fi
	rm -f "$log"
}
build "$build" -Dtests=true -Dfaults=true
build "$release" --buildtype=release

FORKFS_GUEST_KIT=$("$root/tests/guest/build.sh")
export FORKFS_GUEST_KIT
export FORKFS_BUILD=$build FORKFS_BIN=$build/tools/forkfs FORKFS_RELEASE_BIN=$release/tools/forkfs
if [ -n "${FORKFS_TEST_BUILD:-}" ]; then
	export FORKFS_BIN=$FORKFS_TEST_BUILD/tools/forkfs FORKFS_RELEASE_BIN=$FORKFS_TEST_BUILD/tools/forkfs
fi
export PYTHONPATH=$root/tests/lib PYTHONDONTWRITEBYTECODE=1
exec python3 -m forkfs_test.runner --build "$build" "$@"
