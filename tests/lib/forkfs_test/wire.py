"""Frames between a host and the agent of a guest (docs/agent.md), for who stands between them or in the place of one."""

import json
import socket
import threading

NAMES = {1: "HELLO", 2: "ACCEPT", 3: "PING", 16: "EXEC", 17: "STDIN", 18: "STDIN_END", 19: "SIGNAL", 20: "RESIZE", 21: "HANGUP", 22: "MAIN",
         32: "WINDOW", 64: "BEGIN", 65: "REBOUND", 66: "ACK", 67: "OUTPUT", 68: "PONG", 69: "ERROR", 80: "STARTED", 81: "REFUSED",
         82: "STDOUT", 83: "STDERR", 84: "EXIT", 96: "STATUS", 97: "HEALTH"}
TYPES = {name: number for number, name in NAMES.items()}


def _table():
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        yield crc


TABLE = list(_table())


def crc32c(data):
    """CRC-32C (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def encode(name, payload=b"", stream=0):
    """The bytes of a frame, with a zero in front of it too."""
    body = bytes([1, TYPES[name], 0, 0]) + stream.to_bytes(4, "little") + payload
    body += crc32c(body).to_bytes(4, "little")
    out = b""
    blocks = body.split(b"\0")
    for i, block in enumerate(blocks):
        while len(block) >= 254:
            out, block = out + b"\xff" + block[:254], block[254:]
            if not block and i == len(blocks) - 1:
                break
        else:
            out += bytes([len(block) + 1]) + block
    return b"\0" + out + b"\0"


def _unstuff(data):
    out, at = b"", 0
    while at < len(data):
        n = data[at]
        out += data[at + 1:at + n] + (b"\0" if n != 255 and at + n < len(data) else b"")
        at += n
    return out


class Reader:
    """Whole frames from a socket, as (name, stream, payload); those that are damaged are passed over. Ends at its end."""

    def __init__(self, sock):
        self.sock, self.rest = sock, b""

    def __iter__(self):
        while True:
            try:
                data = self.sock.recv(65536)
            except OSError:
                return
            if not data:
                return
            *whole, self.rest = (self.rest + data).split(b"\0")
            for raw in filter(None, whole):
                body = _unstuff(raw)
                if len(body) >= 12 and crc32c(body[:-4]) == int.from_bytes(body[-4:], "little"):
                    yield NAMES[body[1]], int.from_bytes(body[4:8], "little"), body[8:-4]


def what_link_knows(path):
    """What the link of the agent at that socket knows at this moment."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(30)
        s.connect(f"{path}.link")
        s.sendall(encode("HEALTH", b"\0"))
        return json.loads(next(iter(Reader(s)))[2])


class Listener(threading.Thread):
    """A unix socket of this process at `path`, in place of a VM's: `serve(sock)` is called for the first who connects."""

    def __init__(self, case, path):
        super().__init__(daemon=True)
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.socks = [self.listener]
        case.on_end(self.stop)
        self.start()

    def run(self):
        """The thread."""
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return  # stopped before anybody came
        self.socks.append(sock)
        self.serve(sock)

    def serve(self, sock):
        """Talk to the host."""
        raise NotImplementedError

    def stop(self):
        """As if the VM had ended."""
        for sock in self.socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it was not connected, or is not any more
            sock.close()


class Proxy(Listener):
    """Between a host and the agent at the socket `agent`. may_pass(name, payload): does that frame go on? It may wait.

    log: names of all frames that went on, in their order, those of the guest in small letters.
    """

    def __init__(self, case, path, agent, may_pass):
        self.agent, self.may_pass, self.log = agent, may_pass, []
        super().__init__(case, path)

    def serve(self, sock):
        guest = socket.socket(socket.AF_UNIX)
        guest.connect(str(self.agent))
        self.socks.append(guest)
        back = threading.Thread(target=self._carry, args=(guest, sock, str.lower), daemon=True)
        back.start()
        self._carry(sock, guest, str)

    def _carry(self, source, sink, spell):
        for name, stream, payload in Reader(source):
            if not self.may_pass(name, payload):
                continue
            self.log.append(spell(name))
            try:
                sink.sendall(encode(name, payload, stream))
            except OSError:
                return
