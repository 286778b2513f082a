"""System calls as the tests make them: what Python has no function for, and what is to fail."""

import contextlib
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p


def call(name, *args):
    """A function of libc that gives -1 and errno."""
    if getattr(libc, name)(*args) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def errno_of(function, *args):
    """The errno of the OSError that a call raises, 0 when it works."""
    try:
        function(*args)
    except OSError as e:
        return e.errno
    return 0


@contextlib.contextmanager
def opened(path, flags=os.O_RDONLY):
    """An open file."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def mapped(fd, prot, flags):
    """A mapping of the first page, as its address."""
    at = libc.mmap(None, ctypes.c_size_t(4096), prot, flags, fd, ctypes.c_long(0))
    if at == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        yield at
    finally:
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(4096))
