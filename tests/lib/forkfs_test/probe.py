"""Can this machine run the integration tests? Found by trying, not by version numbers."""

import ctypes
import fcntl
import os
import shutil
import struct

SYS_USERFAULTFD = 323
UFFDIO_API = 0xC018AA3F
WP = 1 << 0
WP_SHMEM = 1 << 12
WP_UNPOPULATED = 1 << 13


def uffd_reason():
    """Why write protection by userfaultfd does not work here, or None."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    if fd < 0:
        return f"userfaultfd(2): {os.strerror(ctypes.get_errno())}"
    try:
        answer = fcntl.ioctl(fd, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
    except OSError as e:
        return f"UFFDIO_API: {e.strerror}"
    finally:
        os.close(fd)
    features = struct.unpack("QQQ", answer)[1]
    for bit, what in ((WP, "write protection"), (WP_SHMEM, "write protection of memfds"),
                      (WP_UNPOPULATED, "write protection of pages never touched")):
        if not features & bit:
            return f"the kernel's userfaultfd has no {what}"
    return None


def reasons():
    """Why the integration tests cannot run here; empty when they can."""
    found = []
    if os.geteuid() != 0:
        found.append("not root")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        found.append(f"/dev/fuse: {e.strerror}")
    why = uffd_reason()
    if why:
        found.append(why)
    if not shutil.which("qemu-system-x86_64"):
        found.append("no qemu-system-x86_64")
    return found
