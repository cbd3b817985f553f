"""What computes a model's outputs: its network as torch runs it, or its compiled form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swiprd.bundle import Bundle
from swiprd.compiled import CompiledError, Form
from swiprd.network import build_network


@dataclass(frozen=True, slots=True)
class Engine:
    """A way to compute.

    Attributes:
        name: ``eager`` or ``compiled``, as ``status`` reports it.
        precision: of the computation, ``fp32`` or ``bf16``.
        run: from the input, float32 (1, 3, crop, crop), to the outputs, float32 (1, outputs).
    """

    name: str
    precision: str
    run: Callable[[Tensor], Tensor]


def eager(bundle: Bundle) -> Engine:
    """Return the network of ``bundle`` as torch runs it.

    Raises:
        BundleError: the architecture is not known, or the weights are not its own.
    """
    return Engine("eager", "fp32", build_network(bundle))


def compiled(form: Form) -> Engine:
    """Return the compiled form, loaded into this process.

    Raises:
        CompiledError: torch cannot load it.
    """
    try:
        # Torch's public way would import its compiler, which takes seconds.
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(form.path, 1)
    except (RuntimeError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise CompiledError(f"{form.path} cannot be loaded: {problem:.200}") from None

    def run(x: Tensor) -> Tensor:
        outputs: Tensor = runner.run([x])[0]
        return outputs

    return Engine("compiled", form.precision, run)
