"""The client of swiprd, a daemon that scores images. Standard library only.

::

    from swiprctl import Client

    with Client() as client:
        print(client.compute("cat.jpg").scores)
"""

from swiprctl.client import Client
from swiprctl.protocol import Result, SwiprError, Thumbnail

__version__ = "0.1.0"
__all__ = ["Client", "Result", "SwiprError", "Thumbnail"]
