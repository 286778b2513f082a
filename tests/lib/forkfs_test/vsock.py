"""What Firecracker is to a host that wants a vsock port of its guest: python3 -m forkfs_test.vsock SOCKET AGENT_SOCKET MODE.

The guest is an agent of this machine. MODE: good; refuse (the first three times nobody listens in the guest); byte (its answer comes
byte by byte, and what the agent says behind it at once); or any text, which is the answer, and then nothing. Prints "ready".
"""

import os
import select
import socket
import sys
import threading

REFUSALS = 3


def copy(a, b):
    """Carry bytes both ways until one end is gone."""
    with a, b:
        while True:
            for s in select.select([a, b], [], [])[0]:
                data = s.recv(65536)
                if not data:
                    return
                (b if s is a else a).sendall(data)


def serve(client, agent, mode, count):
    """One connection."""
    asked = b""
    while not asked.endswith(b"\n"):
        piece = client.recv(1)
        if not piece:
            return
        asked += piece
    print(asked.decode().strip(), flush=True)
    if mode == "refuse" and count <= REFUSALS:
        client.close()
        return
    if mode not in ("good", "refuse", "byte"):
        client.sendall(mode.encode())
        client.recv(1)
        return
    there = socket.socket(socket.AF_UNIX)
    there.connect(agent)
    answer = b"OK 1073741824\n"
    for piece in ([answer[i:i + 1] for i in range(len(answer))] if mode == "byte" else [answer]):
        client.sendall(piece)
    try:
        copy(client, there)
    except OSError:  # either end was reset
        pass


def main(path, agent, mode):
    """Until it is killed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    print("ready", flush=True)
    count = 0
    while True:
        client, _ = listener.accept()
        count += 1
        threading.Thread(target=serve, args=(client, agent, mode, count), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
    os._exit(0)
