"""The serial console of a guest: lines with the time they came."""

import re
import threading
import time


class Console:
    """Reads a pipe line by line in a thread, keeps every line, and writes them to a log file."""

    def __init__(self, pipe, log_path):
        self._changed = threading.Condition()
        self._ended = False
        self.lines = []
        threading.Thread(target=self._read, args=(pipe, log_path), daemon=True).start()

    def _read(self, pipe, log_path):
        with open(log_path, "w", encoding="utf-8") as log, pipe:
            for raw in pipe:
                line = raw.decode("utf-8", "replace").rstrip("\r\n")
                log.write(line + "\n")
                log.flush()
                with self._changed:
                    self.lines.append((time.monotonic(), line))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def mark(self):
        """A position: waiting from it sees only lines that come later."""
        with self._changed:
            return len(self.lines)

    def wait(self, pattern, timeout=60, start=0):
        """Wait for a line that matches the regular expression; the match. AssertionError when it does not come."""
        regex = re.compile(pattern)
        seen = start

        def found():
            nonlocal seen
            while seen < len(self.lines):
                match = regex.search(self.lines[seen][1])
                seen += 1
                if match:
                    return match
            return None

        match = None

        def ready():
            nonlocal match
            match = found()
            return match or self._ended

        with self._changed:
            self._changed.wait_for(ready, timeout)
            if match:
                return match
            tail = [text for _, text in self.lines[-5:]]
        ended = "it has ended" if self._ended else f"not in {timeout} s"
        raise AssertionError(f"the console did not say /{pattern}/: {ended}; its last lines: {tail}")

    def all(self, pattern, start=0):
        """Every match so far, as (time, match)."""
        regex = re.compile(pattern)
        with self._changed:
            pairs = [(when, regex.search(text)) for when, text in self.lines[start:]]
        return [(when, match) for when, match in pairs if match]
