"""One engine in a process of its own: the model called directly, without any server.

    python -m bench.engines NAME THREADS FOLDER

Each line ``COUNT PATH`` on standard input has the picture scored so often; the answer is a line
of JSON, for each time the milliseconds of decoding, preparing and computing. ``matmul-fp32`` and
``matmul-bf16`` multiply matrices instead, as fast as torch can; their answer is GFLOP/s.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from bench.material import Material
from bench.subjects import SPINNING
from swiprd.bundle import Bundle, read_bundle
from swiprd.compiled import FormCache, this_host
from swiprd.engines import Engine, compiled, eager
from swiprd.model import Model

ENGINES: Final = ("eager", "compiled", SPINNING, "onnxruntime", "openvino")
BF16_ENGINE: Final = "compiled-bf16"
MATMULS: Final = ("matmul-fp32", "matmul-bf16")
MATRIX: Final = 2048
"""Rows and columns. In larger ones torch gets no faster here."""
MAX_PIXELS: Final = 50_000_000


def main() -> int:
    """Answer what standard input asks."""
    name, threads, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(threads)
    answer = _multiply(name) if name in MATMULS else _score(load(name, threads, Material(folder)))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        count, path = line.split(maxsplit=1)
        print(json.dumps([answer(path.strip()) for _ in range(int(count))]), flush=True)
    return 0


def load(name: str, threads: int, material: Material) -> Model:
    """Return the model on that engine, its golden answers checked."""
    bundle = read_bundle(str(material.bundle))
    model = Model(bundle, _engine(name, threads, material, bundle), max_pixels=MAX_PIXELS)
    model.check_golden()
    return model


def _engine(name: str, threads: int, material: Material, bundle: Bundle) -> Engine:
    match name:
        case "eager":
            return eager(bundle)
        case _ if name.startswith("compiled"):
            precision = "bf16" if name.endswith("bf16") else "fp32"
            form = FormCache(str(material.cache), this_host(threads)).find(bundle.digest, precision)
            assert form is not None, f"no form in {precision} was compiled"
            return compiled(form)
        case "onnxruntime":
            return Engine(name, "fp32", _onnxruntime(str(material.onnx), threads))
    return Engine(name, "fp32", _openvino(str(material.onnx), threads))


def _onnxruntime(path: str, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])


def _openvino(path: str, threads: int) -> Callable[[Tensor], Tensor]:
    import openvino

    hints = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()

    def run(x: Tensor) -> Tensor:
        (outputs,) = request.infer({0: x.contiguous().numpy()}).values()
        return torch.from_numpy(outputs)

    return run


def _score(model: Model) -> Callable[[str], dict[str, float]]:
    def score(path: str) -> dict[str, float]:
        began = time.perf_counter()
        with open(path, "rb") as file:
            picture = model.decode(file.read())
        decoded = time.perf_counter()
        inputs = model.prepare(picture)
        prepared = time.perf_counter()
        model.score(inputs)
        done = time.perf_counter()
        return {
            "decode": 1000 * (decoded - began),
            "prepare": 1000 * (prepared - decoded),
            "compute": 1000 * (done - prepared),
            "whole": 1000 * (done - began),
        }

    return score


def _multiply(name: str) -> Callable[[str], float]:
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    a, b = (torch.randn(MATRIX, MATRIX, dtype=dtype) for _ in range(2))

    def multiply(_: str) -> float:
        began = time.perf_counter()
        torch.matmul(a, b)
        return 2 * MATRIX**3 / (time.perf_counter() - began) / 1e9

    return multiply


if __name__ == "__main__":
    sys.exit(main())
