#!/usr/bin/env python3
"""Check that includes go one way only: tools -> fs -> engine -> engine/base.

Usage: check_layers.py SOURCE_ROOT. Prints every include that goes the wrong way and fails if there is one.
"""

import pathlib
import re
import sys

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
# What a file of a layer must not include: folders relative to the source root.
FORBIDDEN = {
    "engine/base": ["engine", "engine/mailbox", "fs", "tools"],
    "engine/mailbox": ["engine", "fs", "tools"],
    "engine": ["fs", "tools"],
    "fs": ["tools"],
    "tools": [],
}
# What everybody may include of engine/ besides base/.
PUBLIC = {"engine/forkfs-engine.h", "engine/store/store.h", "engine/store/forks.h", "engine/store/working-set.h", "engine/pager/pager.h",
          "engine/mailbox/mailbox.h", "engine/mailbox/ack.h"}
# And what `forkfs doctor` tries out by itself.
DOCTOR = {"engine/uffd/inject.h", "engine/uffd/uffd.h"}

# And how `forkfs restore` talks to the VMMs it starts, and sees where they have mapped a branch and what of it they touched.
RESTORE = {"engine/vmm/qmp.h", "engine/vmm/http.h", "engine/vmm/dial.h", "engine/guest/maps.h",
           "engine/guest/touched.h"}


def layer_of(path):
    """The layer a source file belongs to, the most specific one first."""
    for layer in ("engine/base", "engine/mailbox", "engine", "fs", "tools"):
        if path.startswith(layer + "/"):
            return layer
    return None


def resolve(root, source, name):
    """The file an include names, relative to the root, or None for one that is not ours."""
    for base in (source.parent, root / "engine", root):
        target = (base / name).resolve()
        if target.is_file() and root in target.parents:
            return target.relative_to(root).as_posix()
    return None


def wrong_includes(root):
    """Yield (file, include) for each include against the order."""
    for source in sorted(root.glob("**/*.[ch]")):
        path = source.relative_to(root).as_posix()
        layer = layer_of(path)
        if layer is None:
            continue
        for name in INCLUDE.findall(source.read_text()):
            target = resolve(root, source, name)
            if target is None:
                continue
            other = layer_of(target)
            if target in PUBLIC or other == layer or (layer == "tools" and target in DOCTOR | RESTORE):
                continue
            if other in FORBIDDEN[layer] or other == "engine":
                yield path, name


def main():
    root = pathlib.Path(sys.argv[1]).resolve()
    wrong = list(wrong_includes(root))
    for path, name in wrong:
        print(f'{path}: includes "{name}": includes go tools -> fs -> engine -> engine/base only')
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
