"""From a network to its compiled form: a shared library, made ahead of time by torch's compiler.

The only importer of that compiler, which no daemon that serves imports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn

from swiprd.architectures import CACHE_VARIABLE

OPTIONS: Final = {
    "freezing": True,  # weights become constants, and are laid out for the convolutions
    "cpp.dynamic_threads": True,  # as many as the worker sets, not as many as there are now
    # They are looked for in a folder in /tmp whose name others know, and taken unseen.
    "aot_inductor.precompile_headers": False,
}
LIBRARY: Final = ".so"


class CompileError(Exception):
    """The network cannot be compiled here; the message is one line."""


class _InBfloat16(nn.Module):
    """Computes in bfloat16 between a float32 input and float32 outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 to float32."""
        outputs: Tensor = self.network(x.to(torch.bfloat16))
        return outputs.float()


@contextlib.contextmanager
def workspace() -> Iterator[str]:
    """Make an empty folder that is this user's alone, for all that torch's compiler writes.

    It must be entered before anything imports ``torch._dynamo``, torchvision for one: otherwise
    torch makes a folder in /tmp whose name others know, and leaves it there.
    """
    with tempfile.TemporaryDirectory(prefix="swipr-") as folder:
        # The only way in which torch and g++ let themselves be told.
        names = (CACHE_VARIABLE, "TMPDIR")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(dict.fromkeys(names, folder))
        try:
            yield folder
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def compile_network(network: nn.Module, side: int, precision: str, folder: str) -> str:
    """Compile ``network`` for one picture at a time and return the path of the library.

    Args:
        network: for evaluation, its weights plain tensors without gradients. With ``bf16`` its
            weights are rounded in place.
        side: of the input, in pixels.
        precision: ``fp32`` or ``bf16``.
        folder: what ``workspace`` made.

    Raises:
        CompileError: torch cannot compile this network.
    """
    example = torch.zeros(1, 3, side, side).to(memory_format=torch.channels_last)
    package = os.path.join(folder, "package.pt2")
    with _quiet(), torch.no_grad():
        from torch._inductor import aoti_compile_and_package

        module = _InBfloat16(network) if precision == "bf16" else network
        try:
            exported = torch.export.export(module, (example,))
            options = {**OPTIONS, "cpp.march": _march()}
            aoti_compile_and_package(exported, package_path=package, inductor_configs=options)
        except Exception as error:  # so is what a compiler may raise
            # A C++ compiler's own words come last, after a command line of many.
            problem = " ".join(str(error).rpartition("Output:")[2].split())
            raise CompileError(f"torch cannot compile it: {problem:.300}") from error
    return _unpack(package, os.path.join(folder, "model" + LIBRARY))


def check_compiler() -> None:
    """Look for a C++ compiler, where torch will; within ``workspace``.

    Raises:
        CompileError: there is none.
    """
    with _quiet():
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:  # its kind is torch's own business
            raise CompileError(
                "there is no C++ compiler; install g++ (Debian: apt-get install g++)"
            ) from error


def _march() -> str | None:
    """Return the processor that g++ compiles for; None: just this one.

    On x86 it must not be just this one: a form is looked up by the features that torch tells of,
    and those are not all. What x86-64-v3 and torch's own flags for vectors need is among them.
    """
    if platform.machine() != "x86_64":
        return None
    features = torch.cpu.get_capabilities()
    return "x86-64-v3" if features.get("avx2") and features.get("fma3") else ""


def _unpack(package: str, target: str) -> str:
    """Take the library out of torch's package, which is unpacked anew at each start otherwise."""
    with zipfile.ZipFile(package) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(LIBRARY)]
        if len(libraries) != 1:
            raise CompileError(f"expected torch to make one library, got {len(libraries)}")
        with archive.open(libraries[0]) as source, open(target, "wb") as file:
            while part := source.read(2**20):
                file.write(part)
    os.unlink(package)
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's compiler from telling about itself."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
