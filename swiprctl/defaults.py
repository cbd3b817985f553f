"""Where the daemon is, and how long it may take, unless one says otherwise."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

SYSTEM_SOCKET: Final = "/run/swipr/swipr.sock"
DEFAULT_TIMEOUT: Final = 15.0
"""Seconds for one call: the daemon's own deadline for an image (10 s) and a little."""
RELOAD_TIMEOUT: Final = 150.0
"""Seconds for a reload: the daemon's own deadline for loading a model (120 s) and a little."""


def default_socket() -> str:
    """Return where the daemon is expected to listen.

    ``$SWIPR_SOCKET``, else the user's own ``$XDG_RUNTIME_DIR/swipr/swipr.sock`` where that exists,
    else ``/run/swipr/swipr.sock``.
    """
    named = os.environ.get("SWIPR_SOCKET")
    if named:
        return named
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        own = os.path.join(runtime, "swipr", "swipr.sock")
        if os.path.exists(own):
            return own
    return SYSTEM_SOCKET
