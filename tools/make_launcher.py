"""Make an environment's swiprctl start without the site module: tools/make_launcher.py

Run by the Python of the environment in which Swipr was just installed. What pip makes of a console
script looks at whatever else is installed there, which takes a third of a whole ``swiprctl ping``.
"""

from __future__ import annotations

import os
import sys
import sysconfig

LAUNCHER = """\
#!{python} -IS
import sys
sys.path.append({packages!r})
from swiprctl.__main__ import run
run()
"""


def main() -> int:
    """Write the script over the one that pip made."""
    target = os.path.join(sysconfig.get_path("scripts"), "swiprctl")
    packages = sysconfig.get_path("purelib")
    with open(target, "w", encoding="utf-8") as file:
        file.write(LAUNCHER.format(python=sys.executable, packages=packages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
