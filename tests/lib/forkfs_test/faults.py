"""The names of the fault points, read from the sources: a new point is tested without anybody listing it."""

import pathlib
import re

SOURCES = pathlib.Path(__file__).resolve().parents[3]
NAMED = re.compile(r'\b(?:FFS_FAULT|way_back)\("([a-z0-9-]+)"\)')
COMMAND = re.compile(r'call\(\s*\w+, "([a-z_-]+)"')


def points():
    """Every fault point of engine and file system; each command that is sent to QEMU is two: the request and its reply."""
    names = []
    for path in sorted([*SOURCES.glob("engine/**/*.c"), *SOURCES.glob("fs/**/*.c")]):
        text = path.read_text()
        names += NAMED.findall(text)
        for command in COMMAND.findall(text):
            names += [f"qmp-{command}", f"qmp-{command}-reply"]
    return sorted(set(names))


def passed(case, guest):
    """The fault points that attach, a branch and its capture pass, found by passing them: a hold whose end is there leaves its mark."""
    marks = case.dir / "marks"
    marks.mkdir()
    mount = case.mount("discovery")
    for point in points():
        (marks / point).touch()
    mount.faults(*[f"{point} hold:{marks / point}" for point in points()])
    mount.attach(guest)
    mount.run("branch", guest.name, "b")  # which may take longer than mkdir: passing a point is slow
    mount.faults()
    mount.stop()
    return [point for point in points() if (marks / f"{point}.held").exists()]
