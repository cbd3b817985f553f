"""The compiled model behind FastAPI and uvicorn, at a Unix socket.

python -m bench.fastapi_service SOCKET THREADS FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from bench.engines import load
from bench.material import Material


class Request(BaseModel):
    """What is asked: a picture's path."""

    path: str


def main() -> None:
    """Serve until a signal."""
    address, threads, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(threads)
    model = load("compiled", threads, Material(folder))
    app = FastAPI()

    async def compute(request: Request) -> dict[str, tuple[float, ...]]:
        # In the event loop: with threads beside it, two pictures would share the processors.
        with open(request.path, "rb") as file:
            return {"scores": model.compute(file.read())}

    app.add_api_route("/compute", compute, methods=["POST"])
    uvicorn.run(app, uds=address, log_level="warning")


if __name__ == "__main__":
    main()
