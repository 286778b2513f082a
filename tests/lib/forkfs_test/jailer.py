"""A program for Firecracker's jailer and what it starts, in one, where there is neither: it makes a jail as that one does, and in it
answers Firecracker's API, looks at what it was given, and says so in the file `seen`.

    jailer.py --id ID --exec-file FILE --uid UID --gid GID --chroot-base-dir DIR [--new-pid-ns] [--then fail|refuse|silent] -- ARGS"""

import ctypes
import hashlib
import json
import os
import socket
import sys
import time

NEWNS, NEWPID = 0x20000, 0x20000000
MS_BIND, MS_REC, MS_SLAVE, MNT_DETACH, PIVOT_ROOT = 4096, 16384, 1 << 19, 2, 155
libc = ctypes.CDLL(None, use_errno=True)


def must(result):
    """Fail unless a call has succeeded."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def jail(root):
    """As src/jailer/src/chroot.rs."""
    must(libc.unshare(NEWNS))
    must(libc.mount(None, b"/", None, MS_SLAVE | MS_REC, None))
    must(libc.mount(root.encode(), root.encode(), None, MS_BIND | MS_REC, None))
    os.chdir(root)
    os.mkdir("old_root", 0o600)
    must(libc.syscall(PIVOT_ROOT, b".", b"old_root"))
    os.chdir("/")
    must(libc.umount2(b"old_root", MNT_DETACH))
    os.rmdir("old_root")


def digest(path):
    """Of a file, which nobody here can write."""
    try:
        with open(path, "r+b"):
            return "writable"
    except OSError:
        with open(path, "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()


def answer(head, body, then):
    """One request; the status and the body of its answer."""
    if head.startswith("GET / "):
        return 200, json.dumps({"vmm_version": "1.16.1", "state": "Paused", "app_name": "Firecracker"})
    if head.startswith("PUT /snapshot/load"):
        asked = json.loads(body)
        seen = {"uid": os.getuid(), "gid": os.getgid(), "files": sorted(os.listdir("/")), "load": asked,
                "vmstate": digest(asked["snapshot_path"]), "memory": digest(asked["mem_backend"]["backend_path"])}
        with open("seen.new", "w", encoding="utf-8") as f:
            json.dump(seen, f)
        os.rename("seen.new", "seen")
        if then == "silent":
            time.sleep(1000)
        if then == "refuse":
            return 400, '{"fault_message":"no such branch"}'
    return 204, ""


def serve(then):
    """The API, one connection after the other."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("/api")
        listening.listen()
        while True:
            peer, _ = listening.accept()
            with peer:
                text = b""
                while more := peer.recv(65536):
                    text += more
                    head, blank, body = text.partition(b"\r\n\r\n")
                    length = [int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length")]
                    if blank and len(body) >= sum(length):
                        status, said = answer(head.decode(), body, then)
                        peer.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(said)}\r\n\r\n{said}".encode())
                        text = b""


def main():
    """The jailer, then what it starts."""
    words = sys.argv[1:sys.argv.index("--")]
    said = dict(zip(words, words[1:]))
    name = os.path.basename(said["--exec-file"])
    root = os.path.join(os.path.realpath(said["--chroot-base-dir"]), name, said["--id"], "root")
    os.closerange(3, 1024)
    if said.get("--then") == "fail":
        sys.exit("the jailer has failed")
    jail(root)
    os.chown("/", int(said["--uid"]), int(said["--gid"]))
    if "--new-pid-ns" in words:
        must(libc.unshare(NEWPID))
        if pid := os.fork():
            with open(f"/{name}.pid", "x", encoding="utf-8") as f:
                f.write(str(pid))
            os._exit(0)
    os.setgroups([])
    os.setgid(int(said["--gid"]))
    os.setuid(int(said["--uid"]))
    serve(said.get("--then"))


if __name__ == "__main__":
    main()
