"""A small QMP client: commands with answers, and every event with the time it came."""

import json
import socket
import threading
import time


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """One connection to a QMP socket. A thread of its own reads; `execute` may be called from any thread."""

    def __init__(self, path, timeout=10):
        deadline = time.monotonic() + timeout
        while True:
            self._sock = socket.socket(socket.AF_UNIX)
            try:
                self._sock.connect(path)
                break
            except OSError:
                self._sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self._file = self._sock.makefile("r")
        self._changed = threading.Condition()
        self._answers = {}
        self._next = 0
        self._closed = False
        self.events = []
        json.loads(self._file.readline())
        threading.Thread(target=self._read, daemon=True).start()
        self.execute("qmp_capabilities")

    def _read(self):
        try:
            for line in self._file:
                message = json.loads(line)
                with self._changed:
                    if "event" in message:
                        self.events.append((time.monotonic(), message))
                    else:
                        self._answers[message.get("id")] = message
                    self._changed.notify_all()
        except (OSError, ValueError):
            pass
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def execute(self, command, timeout=20, fd=None, **arguments):
        """The `return` of a command; QmpError when QEMU refuses, or has gone, or does not answer in time.

        `fd` is passed along, as `getfd` wants it.
        """
        with self._changed:
            number = self._next
            self._next += 1
        request = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = arguments
        try:
            data = json.dumps(request).encode() + b"\n"
            if fd is None:
                self._sock.sendall(data)
            else:
                socket.send_fds(self._sock, [data], [fd])
        except OSError as e:
            raise QmpError(f"{command}: {e}") from e
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._answers or self._closed, timeout):
                raise QmpError(f"{command}: no answer in {timeout} s")
            if number not in self._answers:
                raise QmpError(f"{command}: the connection was closed")
            answer = self._answers.pop(number)
        if "error" in answer:
            raise QmpError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def monitor(self, line):
        """What a command of the human monitor prints."""
        return self.execute("human-monitor-command", **{"command-line": line})

    def count(self, event):
        """How often an event came."""
        with self._changed:
            return sum(1 for _, message in self.events if message["event"] == event)

    def times(self, event):
        """When an event came, time.monotonic()."""
        with self._changed:
            return [when for when, message in self.events if message["event"] == event]

    def wait_event(self, matches, timeout=20):
        """Wait for an event for which matches(message) is true; the message."""
        def found():
            return next((m for _, m in self.events if matches(m)), None)
        with self._changed:
            if not self._changed.wait_for(lambda: found() or self._closed, timeout) or not found():
                raise QmpError("the event did not come")
            return found()

    def status(self):
        """The run state in QEMU's words: running, paused, …"""
        return self.execute("query-status")["status"]

    def close(self):
        """Close the connection; the thread ends."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()
