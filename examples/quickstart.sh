#!/bin/bash
# forkfs in one command: a running VM becomes a directory, cp takes its snapshot, and a child VM goes on from the copy.
#
# Usage: examples/quickstart.sh [--keep]
#
#   --keep   leave VMs and mount running to play with; prints how to end them
#
# Installs what is missing (Debian 12, root), builds into build/, and leaves nothing behind: no process, no mount, no file.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
keep=false
case ${1:-} in
'') ;;
--keep) keep=true ;;
*)
	echo "usage: examples/quickstart.sh [--keep]" >&2
	exit 2
	;;
esac

step() {
	printf '\n== %s\n' "$*"
}

# shown COMMAND…: print it as one would type it, then do it.
shown() {
	echo "\$ $*"
	"$@"
}

dir=
pids=()
cleanup() {
	local status=$? pid
	trap - EXIT INT TERM
	if [ -n "$dir" ]; then
		if mountpoint -q "$dir/forkfs" 2>/dev/null; then
			"$forkfs" umount "$dir/forkfs" || umount -l "$dir/forkfs"
		fi
		for pid in "${pids[@]}"; do
			kill "$pid" 2>/dev/null || true
			wait "$pid" 2>/dev/null || true
		done
		if [ $status -ne 0 ]; then
			tail -n 5 "$dir"/*.log 2>/dev/null >&2 || true
		fi
		rm -rf "$dir"
	fi
	exit $status
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# wait_for SECONDS WHAT COMMAND…: until the command succeeds.
wait_for() {
	local deadline=$((SECONDS + $1)) what=$2
	shift 2
	until "$@"; do
		if [ $SECONDS -ge $deadline ]; then
			echo "quickstart: $what did not happen in time" >&2
			return 1
		fi
		sleep 0.05
	done
}

# Start a VM in the background: vm NAME MEMORY-BACKEND QEMU-OPTION…; its console goes to NAME.log.
vm() {
	local name=$1 memory=$2
	shift 2
	setsid qemu-system-x86_64 -M microvm,acpi=off,memory-backend=ram0 -object "$memory,id=ram0,size=192M" -m 192M -smp 2 \
		"${accel[@]}" -nodefaults -no-user-config -display none -serial "file:$dir/$name.log" \
		-kernel "$kit/vmlinuz" -initrd "$kit/initrd" -append 'console=ttyS0 quiet panic=-1 run=counter' \
		-qmp "unix:$dir/$name.qmp,server=on,wait=off" "$@" </dev/null >/dev/null 2>>"$dir/$name.err.log" &
	pids+=($!)
}

last_tick() {
	grep -as '^tick [0-9]*.$' "$dir/$1.log" | tail -n 1 | tr -d '\r'
}

step "What is needed"
"$root/tests/lib/packages.sh" build
build=$root/build
log=$(mktemp)
if ! { { [ -f "$build/build.ninja" ] || meson setup "$build" "$root"; } && ninja -C "$build"; } >"$log" 2>&1; then
	cat "$log" >&2
	rm -f "$log"
	exit 1
fi
rm -f "$log"
forkfs=$build/tools/forkfs
kit=$("$root/tests/guest/build.sh")
echo "built $forkfs; guest kernel: $(basename "$(readlink -f "$kit/vmlinuz")")"
accel=(-accel tcg -cpu max)
if [ -d /sys/module/kvm_intel ] || [ -d /sys/module/kvm_amd ]; then
	accel=(-accel kvm -cpu host)
fi

step "A Linux VM that counts, in a stock QEMU (${accel[1]})"
dir=$(mktemp -d)
vm parent memory-backend-memfd,share=on
wait_for 60 "the VM's first ticks" grep -asq '^tick 20' "$dir/parent.log"
echo "it says: $(last_tick parent)"

step "The VM becomes a directory"
mkdir "$dir/forkfs"
export FORKFS=$dir/forkfs
PATH=$build/tools:$PATH
shown forkfs mount "$FORKFS"
shown forkfs attach sbx1 --qemu "$dir/parent.qmp"
shown ls -l "$FORKFS/sbx1" "$FORKFS/sbx1/branch"

step "A snapshot of it is a copy of two files"
before=$(last_tick parent)
shown cp "$FORKFS/sbx1/branch/memory.bin" "$dir/memory.bin"
shown cp "$FORKFS/sbx1/branch/vmstate" "$dir/vmstate"
echo "while the VM counted from $before to $(last_tick parent)"
pause=$(forkfs status sbx1 --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["last_branch"]["pause_ns"] / 1e6)')
printf 'the VM was stopped for %.2f ms\n' "$pause"

step "A child VM wakes from the copies"
vm child "memory-backend-file,mem-path=$dir/memory.bin,share=off" \
	-global migration.send-configuration=off -incoming "exec:cat $dir/vmstate"
wait_for 30 "the child's first tick" grep -asq '^tick [0-9]' "$dir/child.log"
printf '%-16s %s\n' parent child
for _ in 1 2 3 4 5 6; do
	sleep 0.5
	printf '%-16s %s\n' "$(last_tick parent)" "$(last_tick child)"
done
echo "the child went on at: $(grep -a -m 1 '^tick [0-9]*.$' "$dir/child.log" | tr -d '\r')"

if $keep; then
	trap - EXIT INT TERM
	cat <<-END

		Everything is still running, in $dir:
		    export FORKFS=$FORKFS PATH=$build/tools:\$PATH
		    mkdir \$FORKFS/sbx1/branches/mine; forkfs status sbx1/mine; tail -f $dir/parent.log
		To end it:
		    forkfs umount $FORKFS; kill ${pids[*]}; rm -r $dir
	END
else
	step "Cleaning up"
fi
