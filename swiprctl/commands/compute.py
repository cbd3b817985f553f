"""swiprctl compute, where one bare tuple does not do."""

from __future__ import annotations

from swiprctl.commands import formats
from swiprctl.commands.scoring import Scoring
from swiprctl.defaults import DEFAULT_TIMEOUT, RELOAD_TIMEOUT
from swiprctl.protocol import SwiprError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Final

    from swiprctl.client import Client

FORMATS: Final = {
    "tuple": formats.Tuple,
    "csv": formats.Csv,
    "json": formats.Json,
    "ndjson": formats.NdJson,
}


def compute(client: Client, args: argparse.Namespace) -> int:
    """Print the scores of all images that ``args`` mean; return the exit status."""
    is_one = len(args.paths) == 1 and args.files_from is None and not args.recursive
    kind = formats.Bare if is_one and args.format == "tuple" else FORMATS[args.format]
    form = kind(labels=args.labels, top=args.top)
    timeout = args.timeout or (DEFAULT_TIMEOUT if is_one else RELOAD_TIMEOUT)
    scoring = Scoring(client, args, timeout=timeout, recursive=args.recursive)
    count = 0
    for name, result in scoring.run():
        try:
            before = "" if count else form.first(result)
            scoring.progress.write(before + form.image(name, result))
            count += 1
        except SwiprError as error:
            scoring.refuse(name, error)
    scoring.progress.write(form.last(count))
    return scoring.status
