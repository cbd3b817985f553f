"""The service that Swipr replaces, written anew as it was: one script, server and client.

    python bench/script_service.py ENDPOINT BUNDLE            serves
    python bench/script_service.py ENDPOINT --compute PATH    asks, and prints 0.66,0.33

A ZeroMQ REP server takes one path at a time; torch computes eagerly in fp32, pillow decodes and
scales. Only the weights come from elsewhere: from a bundle, where it read fast.ai's file.
"""

from __future__ import annotations

import sys

import zmq

KILL_SWITCH = 10_000
"""Milliseconds after which the client gives up, as it did."""


def serve(endpoint: str, bundle_path: str) -> None:
    """Answer for ever."""
    import torch
    import torchvision
    from PIL import Image

    from swiprd.bundle import read_bundle
    from swiprd.network import assemble, to_torch

    bundle = read_bundle(bundle_path)
    assert bundle.manifest.architecture in dir(torchvision.models)
    images = {golden.image for golden in bundle.manifest.golden}
    state = {n: to_torch(t) for n, t in bundle.tensors.items() if n not in images}
    network = assemble(bundle.manifest.architecture, bundle.manifest.head, state)
    rules = bundle.manifest.preprocessing
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (rules.mean, rules.std))

    def score(path: str) -> str:
        picture = Image.open(path).convert("RGB")
        factor = rules.short_side / min(picture.size)
        width, height = (round(side * factor) for side in picture.size)
        # Pillow's box filter is the mean of the pixels covered, as the area filter is.
        picture = picture.resize((width, height), Image.Resampling.BOX)
        left, top = (width - rules.crop) // 2, (height - rules.crop) // 2
        picture = picture.crop((left, top, left + rules.crop, top + rules.crop))
        pixels = torchvision.transforms.functional.pil_to_tensor(picture).float() / rules.scale
        with torch.no_grad():
            scores = network(((pixels - mean) / std).unsqueeze(0)).softmax(1)[0]
        return ",".join(f"{float(score):.2f}" for score in scores)

    server = zmq.Context().socket(zmq.REP)
    server.bind(endpoint)
    while True:
        path = server.recv_string()
        try:
            answer = score(path)
        except FileNotFoundError:
            answer = "-2"
        except Exception:
            answer = "-3"
        server.send_string(answer)


def ask(endpoint: str, path: str) -> str:
    """Return the tuple, or the negative number that stood in its place."""
    client = zmq.Context().socket(zmq.REQ)
    client.setsockopt(zmq.LINGER, 0)
    client.connect(endpoint)
    client.send_string(path)
    return client.recv_string() if client.poll(KILL_SWITCH) else "-4"


if __name__ == "__main__":
    if sys.argv[2] == "--compute":
        print(ask(sys.argv[1], sys.argv[3]))
    else:
        serve(sys.argv[1], sys.argv[2])
