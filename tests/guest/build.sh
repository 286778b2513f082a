#!/bin/bash
# Make the test guest: a stock Debian kernel and an initramfs of our own programs. Nothing is installed.
#
# Usage: build.sh           prints the directory that then holds vmlinuz and initrd
#        build.sh vmgenid   prints the path of another kernel, one with the driver of QEMU's vmgenid
#
# Everything is under ${XDG_CACHE_HOME:-~/.cache}/forkfs-test and made once; the initrd again when its sources change.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/forkfs-test
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# The name of the package that such a one stands for; empty when apt does not know.
concrete_package() {
	apt-cache depends "$1" 2>/dev/null |
		sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

# The same; apt's lists may have to be fetched first.
package_of() {
	local package
	package=$(concrete_package "$1")
	if [ -z "$package" ] && [ "$(id -u)" -eq 0 ]; then
		apt-get -qq update >&2
		package=$(concrete_package "$1")
	fi
	if [ -z "$package" ]; then
		echo "build.sh: apt knows no $1: run 'apt-get update' on a Debian 12 with its main archive" >&2
		return 1
	fi
	echo "$package"
}

# The cloud kernel has no vmgenid, the ordinary one has: of that package (70 MB) only the kernel itself is kept.
ordinary_kernel() {
	local kernel=$cache/vmlinuz-vmgenid package work
	if [ ! -f "$kernel" ]; then
		package=$(package_of linux-image-amd64) || return 1
		work=$(mktemp -d "$cache/download.XXXXXX")
		if ! (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2 &&
			dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x ./boot && mv boot/vmlinuz-* "$kernel"); then
			rm -rf "$work"
			echo "build.sh: cannot download the package $package with apt-get" >&2
			return 1
		fi
		rm -rf "$work"
	fi
	echo "$kernel"
}

# The kernel that linux-image-cloud-amd64 depends on, unpacked; a kernel that is there already stays.
kernel_tree() {
	local tree package work
	for tree in "$cache"/linux-image-*-cloud-amd64; do
		if [ -d "$tree" ]; then
			echo "$tree"
			return
		fi
	done
	package=$(package_of linux-image-cloud-amd64) || return 1
	work=$(mktemp -d "$cache/download.XXXXXX")
	if ! (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2 && dpkg -x "$package"_*.deb tree); then
		rm -rf "$work"
		echo "build.sh: cannot download the package $package with apt-get" >&2
		return 1
	fi
	mv "$work/tree" "$cache/$package"
	rm -rf "$work"
	echo "$cache/$package"
}

# A shell and its tools in one static program, for guests whose process 1 is the agent; unpacked, not installed.
busybox_tree() {
	local tree=$cache/busybox-static work
	if [ ! -d "$tree" ]; then
		work=$(mktemp -d "$cache/download.XXXXXX")
		if ! (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download busybox-static >&2 && dpkg -x busybox-static_*.deb tree); then
			rm -rf "$work"
			echo "build.sh: cannot download the package busybox-static with apt-get" >&2
			return 1
		fi
		mv "$work/tree" "$tree"
		rm -rf "$work"
	fi
	echo "$tree"
}

if [ "${1-}" = vmgenid ]; then
	ordinary_kernel
	exit
fi
tree=$(kernel_tree)
busybox=$(busybox_tree)
kernel=$(ls "$tree"/boot/vmlinuz-*)
agent=$here/../../tools/agent
stamp=$(cat "$here"/*.[ch] "$agent/mailbox.h" "$here/build.sh" "$tree"/boot/config-* | sha256sum | cut -c 1-16)
out=$cache/guest-$stamp
if [ ! -d "$out" ]; then
	# another version of the sources may be in use beside this one
	find "$cache" -maxdepth 1 -name 'guest-*' -mmin +1440 -exec rm -rf {} +
	work=$(mktemp -d "$cache/build.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	root=$work/root
	mkdir -p "$root"/{bin,dev,proc,sys,modules} "$work/out"
	cc -O2 -Wall -Werror -static -pthread -D_GNU_SOURCE -I"$agent" -o "$root/init" "$here"/*.c
	strip "$root/init"
	for name in counter load selfcheck stall journal mailbox decoy; do
		ln "$root/init" "$root/bin/$name"
	done
	# in the order they are loaded: a module after those it needs
	for name in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_balloon; do
		module=$(find "$tree/lib/modules" -name "$name.ko*")
		if [ -n "$module" ]; then
			cp "$module" "$root/modules/"
			basename "$module" >>"$root/modules/order"
		fi
	done
	(cd "$root" && find . | cpio --quiet -o -H newc >"$work/out/initrd")
	# what an initrd of the agent has beside it: forkfs_test/agent.py packs it
	mkdir -p "$work/out/agent"/{bin,modules}
	cp "$busybox"/bin/busybox "$work/out/agent/bin/"
	cp "$root/init" "$work/out/agent/bin/hear"
	# not loaded: a test does that
	for name in vsock vmw_vsock_virtio_transport_common vsock_loopback; do
		module=$(find "$tree/lib/modules" -name "$name.ko*")
		[ -z "$module" ] || cp "$module" "$work/out/agent/modules/"
	done
	for name in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console failover net_failover virtio_net; do
		module=$(find "$tree/lib/modules" -name "$name.ko*")
		if [ -n "$module" ]; then
			cp "$module" "$work/out/agent/modules/"
			basename "$module" >>"$work/out/agent/modules/order"
		fi
	done
	ln -s "$kernel" "$work/out/vmlinuz"
	mv "$work/out" "$out"
fi
echo "$out"
