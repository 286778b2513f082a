"""A VMM that only talks: python3 -m forkfs_test.standin API_SOCKET JSON. Says what it is told, however wrong.

With "pager" it is a child of the pager: it hands over its memory at that socket without being asked, and prints "sent".

Keys of the JSON, all optional: text (the message; %A is the address of its memory, %S its size, %R that of a read-only page), fds
(uffd, none, two, many, null), features (of UFFDIO_API done by itself), answer (status of PUT /uffd/wp; 0: none), silent (does not
connect), keep (its copy of the userfaultfd), who (child: a child connects; space: the userfaultfd is a child's), cut (bytes of the
message that are sent), root (raw answer to GET /), register (1: for missing pages), pager (1). It prints "ready" when it can be attached.
"""

import array
import ctypes
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import sys

SIZE = 4 << 20
SYS_USERFAULTFD = 323
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def new_memory(size, protection):
    """Anonymous memory; its address."""
    return libc.mmap(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


def new_uffd():
    """A userfaultfd of this process."""
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def uffd_of_child():
    """A userfaultfd of a child, which stays."""
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        socket.send_fds(there, [b"x"], [new_uffd()])
        signal.pause()
    return socket.recv_fds(here, 1, 1)[1][0]


class Vmm:
    """What it is told to be."""

    def __init__(self, path, orders):
        self.orders = orders
        self.memory = new_memory(SIZE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.read_only = new_memory(4096, mmap.PROT_READ)
        self.kept = []
        if orders.get("pager"):
            self.hand_over(path)
            print("sent", flush=True)
            signal.pause()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(4)

    def hand_over(self, path):
        """As ordered."""
        orders = self.orders
        text = orders.get("text", '[{"base_host_virt_addr":%A,"size":%S,"offset":0,"page_size":4096,"page_size_kib":4096}]')
        for word, value in (("%A", self.memory), ("%S", SIZE), ("%R", self.read_only)):
            text = text.replace(word, str(value))
        uffd = uffd_of_child() if orders.get("who") == "space" else new_uffd()
        if "features" in orders:
            fcntl.ioctl(uffd, UFFDIO_API, struct.pack("QQQ", 0xAA, orders["features"], 0))
        if orders.get("register"):
            fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("QQQQ", self.memory, SIZE, 1, 0))
        fds = {"uffd": [uffd], "none": [], "two": [uffd, uffd], "many": [uffd] * 20,
               "null": [os.open("/dev/null", os.O_RDONLY)]}[orders.get("fds", "uffd")]
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        data = text.encode()[:orders.get("cut", 1 << 20)]
        if data:
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
        sock.close()
        if orders.get("keep"):
            self.kept.append(uffd)
        else:
            os.close(uffd)

    def answer(self, method, path, body):
        """The raw answer to a request."""
        if (method, path) == ("GET", "/"):
            if "root" in self.orders:
                return self.orders["root"].encode()
            text = b'{"app_name":"standin","vmm_version":"0","state":"Running"}'
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)
        if (method, path) == ("PUT", "/uffd/wp"):
            if not self.orders.get("silent"):
                where = json.loads(body)["socket"]
                if self.orders.get("who") == "child":
                    pid = os.fork()
                    if pid == 0:
                        self.hand_over(where)
                        os._exit(0)
                    os.waitpid(pid, 0)
                else:
                    self.hand_over(where)
            status = self.orders.get("answer", 204)
            if not status:
                return b""
            fault = b'{"fault_message":"ordered\\nto"}'
            return b"HTTP/1.1 %d x\r\n" % status + (
                b"\r\n" if status == 204 else b"Content-Length: %d\r\n\r\n%s" % (len(fault), fault))
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"

    def serve(self):
        """One client after the other."""
        print("ready", flush=True)
        while True:
            client, _ = self.listener.accept()
            data = b""
            while True:
                try:
                    more = client.recv(65536)
                except ConnectionResetError:  # the daemon has heard enough
                    break
                if not more:
                    break
                data += more
                head, end, rest = data.partition(b"\r\n\r\n")
                if not end:
                    continue
                lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
                need = int(lengths[0]) if lengths else 0
                if len(rest) < need:
                    continue
                method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
                data = rest[need:]
                try:
                    client.sendall(self.answer(method, path, rest[:need]))
                except BrokenPipeError:
                    break
            client.close()


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    Vmm(sys.argv[1], json.loads(sys.argv[2])).serve()
