"""The client of swiprd, a daemon that scores images. Standard library only.

::

    from swiprctl import Client

    with Client() as client:
        print(client.compute("cat.jpg").scores)
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from swiprctl.client import Client
    from swiprctl.protocol import Result, SwiprError, Thumbnail

__version__ = "0.1.0"
__all__ = ["Client", "Result", "SwiprError", "Thumbnail"]


def __getattr__(name: str) -> object:
    # Imported when they are asked for: a process of swiprctl mostly does without.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from swiprctl import client, protocol

    found: object = getattr(client if name == "Client" else protocol, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
