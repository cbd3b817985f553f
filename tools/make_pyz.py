"""Make swiprctl.pyz, the client as one file: tools/make_pyz.py TARGET

It runs with any Python that swiprctl runs with, and nothing installed. The same sources, and the
same Python, give the same bytes.
"""

from __future__ import annotations

import os
import py_compile
import shutil
import sys
import tempfile
import zipapp
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = """\
import sys
if sys.version_info < (3, 11):
    sys.exit("swiprctl: expected Python 3.11 or later, got %d.%d" % sys.version_info[:2])
from swiprctl.__main__ import run
run()
"""
INTERPRETER = "/usr/bin/env -S python3 -IS"
"""Without what else is installed, or set: none of it is used, and to look for it takes time."""
LONG_AGO = 315532800
"""The earliest time that a zip file can tell."""


def main() -> int:
    """Write the file that the command line names."""
    (target,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "swiprctl", tree / "swiprctl", ignore=hidden)
        (tree / "__main__.py").write_text(MAIN)
        for source in sorted(tree.rglob("*.py")):
            _compile(source, source.relative_to(tree))
        for path in tree.rglob("*"):
            os.utime(path, (LONG_AGO, LONG_AGO))
        # Not compressed: to unpack takes longer than to read.
        zipapp.create_archive(tree, target, interpreter=INTERPRETER)
    mode = os.stat(target).st_mode
    os.chmod(target, mode | (mode & 0o444) >> 2)  # who may read it may run it
    return 0


def _compile(source: Path, name: Path) -> None:
    # Beside the source, where a Python of another version takes the source instead. Not looked at
    # whether they agree: they came here together.
    py_compile.compile(
        str(source),
        cfile=str(source.with_suffix(".pyc")),
        dfile=f"swiprctl.pyz/{name}",
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


if __name__ == "__main__":
    sys.exit(main())
