"""The compiled model behind LitServe, at a port of the loopback interface: it knows no sockets.

python -m bench.litserve_service PORT THREADS FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve
import torch

from bench.engines import load
from bench.material import Material
from swiprd.model import Model


class Scores(litserve.LitAPI):
    """One picture in, its scores out."""

    def __init__(self, threads: int, folder: Path) -> None:
        super().__init__(api_path="/compute")
        self._threads = threads
        self._folder = folder
        self._model: Model | None = None

    def setup(self, device: str) -> None:
        """Load the model, in the process that computes."""
        torch.set_num_threads(self._threads)
        self._model = load("compiled", self._threads, Material(self._folder))

    def decode_request(self, request: dict[str, str], **_: Any) -> str:
        """Return the picture's path."""
        return request["path"]

    def predict(self, path: str, **_: Any) -> tuple[float, ...]:
        """Score it."""
        assert self._model is not None, "setup() comes first"
        with open(path, "rb") as file:
            return self._model.compute(file.read())

    def encode_response(self, scores: tuple[float, ...], **_: Any) -> dict[str, Any]:
        """Return what becomes JSON."""
        return {"scores": scores}


def main() -> None:
    """Serve until a signal."""
    api = Scores(int(sys.argv[2]), Path(sys.argv[3]))
    server = litserve.LitServer(api, accelerator="cpu", timeout=False)
    port = int(sys.argv[1])
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
