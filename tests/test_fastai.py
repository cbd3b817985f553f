"""Checkpoints of fast.ai 0.7, 1 and 2 score as they did there: swiprd.fastai, swiprd.recognise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from swiprctl.protocol import SwiprError
from swiprd.bundle import Bundle, Manifest, Preprocessing
from swiprd.checkpoint import CheckpointError
from swiprd.commands.import_ import _stored
from swiprd.engines import eager
from swiprd.fastai import FASTAI_0_7, FASTAI_1, FASTAI_2
from swiprd.model import Model
from swiprd.network import assemble
from swiprd.recognise import Recognised, recognise
from tests import checkpoints
from tests.checkpoints import expected, picture

GENERATIONS: dict[str, tuple[Callable[[], dict[str, Tensor]], Preprocessing]] = {
    "0.7": (checkpoints.fastai_0_7, FASTAI_0_7),
    "1": (checkpoints.fastai_1, FASTAI_1),
    "2": (checkpoints.fastai_2, FASTAI_2),
}
CASES = [(generation, name) for generation in GENERATIONS for name in expected(generation)]
SCORED = [(g, name) for g, name in CASES if expected(g)[name]["status"] == "ok"]
REFUSED = [case for case in CASES if case not in SCORED]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def found(generation: str) -> Recognised:
    return recognise(GENERATIONS[generation][0]())


@functools.cache
def model(generation: str) -> Model:
    it = found(generation)
    manifest = Manifest(
        name="test",
        architecture=it.architecture,
        head=it.head,
        labels=("NO", "YES"),
        outputs=None,
        activation="softmax",
        preprocessing=it.preprocessing,
        golden=(),
        source="",
        license="",
    )
    bundle = Bundle(manifest, {name: _stored(t) for name, t in it.tensors.items()}, "")
    return Model(bundle, eager(bundle), max_pixels=10**7)


# --- right to the last digit ---------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_generation_architecture_and_head_are_recognised(generation: str) -> None:
    """From the tensors' names and shapes alone."""
    it = found(generation)
    assert it.system == f"fast.ai {generation}"
    assert it.architecture == "resnext50_32x4d"
    layers = ("concat_pool", "batch_norm", "linear", "relu", "batch_norm", "linear")
    assert it.head == layers
    assert it.classes == 2
    assert it.preprocessing == GENERATIONS[generation][1]


@pytest.mark.parametrize(("generation", "name"), SCORED)
def test_the_scores_are_fastais(generation: str, name: str) -> None:
    """For each picture that fast.ai scored; 0.7 converted CMYK a little otherwise."""
    no, yes = model(generation).compute(picture(name))
    within = 0.02 if generation == "0.7" and "cmyk" in name else 1e-4
    assert yes == pytest.approx(expected(generation)[name]["p_yes"], abs=within)
    assert no + yes == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("generation", "name"), SCORED)
def test_the_input_is_what_fastai_made_of_the_same_file(generation: str, name: str) -> None:
    """Sampled values, means and deviations of the tensor that the network saw agree."""
    within = 0.02 if generation == "0.7" and "cmyk" in name else 2e-5
    wanted: dict[str, Any] = expected(generation)[name]
    this = model(generation)
    got = this.prepare(this.decode(picture(name)))[0].double()
    channels, rows, columns = torch.tensor(checkpoints.POSITIONS).T
    samples = torch.tensor(wanted["samples"], dtype=torch.float64)
    assert len(samples) == 96
    assert float((got[channels, rows, columns] - samples).abs().max()) <= within
    assert got.mean((1, 2)).tolist() == pytest.approx(wanted["mean"], abs=within)
    assert got.std((1, 2), correction=0).tolist() == pytest.approx(wanted["std"], abs=within)


@pytest.mark.parametrize(("generation", "name"), REFUSED)
def test_what_fastai_could_not_read_is_no_image(generation: str, name: str) -> None:
    """It gets an error, not a score."""
    with pytest.raises(SwiprError) as caught:
        model(generation).compute(picture(name))
    assert caught.value.code == "not_an_image"


def test_there_is_an_answer_of_fastai_for_many_kinds_of_pictures() -> None:
    """What the tables of expectations claim to hold is there."""
    assert len(SCORED) >= 12 + 2 * 24
    assert len(REFUSED) >= 2 + 2 * 3


# --- heads ---------------------------------------------------------------------------------------


class ConcatPool(nn.Module):
    """What fast.ai puts before a head, of torch's own layers."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, c, h, w) to (n, 2c, 1, 1)."""
        largest, mean = nn.AdaptiveMaxPool2d(1)(x), nn.AdaptiveAvgPool2d(1)(x)
        return torch.cat([largest, mean], 1)


def head(*layers: nn.Module, concat: bool = True) -> nn.Sequential:
    """Return a head as fast.ai puts it together; the first two layers have no weights."""
    return nn.Sequential(ConcatPool() if concat else nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


def block(inputs: int, outputs: int, *, dropout: bool = True, bias: bool = False) -> list[Any]:
    parts = [nn.BatchNorm1d(inputs), nn.Linear(inputs, outputs, bias=bias)]
    if dropout:
        parts.insert(1, nn.Dropout(0.25))
    return parts


HEADS = {
    "default of 2": head(*block(1024, 512), nn.ReLU(), *block(512, 3)),
    "default of 1": head(*block(1024, 512, bias=True), nn.ReLU(), *block(512, 3, bias=True)),
    "ps=0": head(*block(1024, 9, dropout=False), nn.ReLU(), *block(9, 3, dropout=False)),
    "lin_ftrs=[]": head(*block(1024, 3)),
    "lin_ftrs=[9, 8]": head(*block(1024, 9), nn.ReLU(), *block(9, 8), nn.ReLU(), *block(8, 3)),
    "concat_pool=False": head(*block(512, 9), nn.ReLU(), *block(9, 3), concat=False),
    "bn_final": head(*block(1024, 9), nn.ReLU(), *block(9, 3), nn.BatchNorm1d(3)),
    "lin_first": head(
        nn.Dropout(0.5),
        nn.Linear(1024, 9, bias=False),
        nn.ReLU(),
        nn.BatchNorm1d(9),
        nn.Dropout(0.5),
        nn.Linear(9, 3),
    ),
    "first_bn=False": head(nn.Dropout(0.5), nn.Linear(1024, 9), nn.ReLU(), *block(9, 3)),
}


def randomised(network: nn.Module) -> nn.Module:
    """Give every weight a value of its own, as training would."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim < 2:
                tensor.normal_(0.2, 0.2)
    return network.eval()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_computes_what_it_did_where_it_was_trained(name: str) -> None:
    """Dropout or none, batch norms first or last, one pool or two: the outputs are the same."""
    body = nn.Sequential(*list(models.resnet18().children())[:-2])
    learner = randomised(nn.Sequential(body, HEADS[name]))
    it = recognise(learner.state_dict())
    assert (it.architecture, it.classes) == ("resnet18", 3)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        got = assemble(it.architecture, it.head, it.tensors)(x)
        assert torch.allclose(got, learner(x), rtol=1e-5, atol=1e-5)


BODIES = {
    # name: how many children fast.ai keeps of it, and whether fast.ai 1 keeps another one
    "densenet121": (1, False),
    "squeezenet1_1": (1, False),
    "mobilenet_v3_small": (1, False),
    "alexnet": (1, True),
    "vgg11_bn": (1, True),
    "shufflenet_v2_x0_5": (6, False),
}


@pytest.mark.parametrize("bias", [True, False], ids=["1", "2"])
@pytest.mark.parametrize("name", BODIES)
def test_a_body_ends_where_fastai_cuts_it(name: str, bias: bool) -> None:
    """The outputs are the same at a size other than 224 too, where a pool left out would show."""
    kept, pooled = BODIES[name]
    body = nn.Sequential(*list(models.get_model(name).children())[: kept + (pooled and bias)])
    with torch.inference_mode():
        x = torch.rand(1, 3, 160, 160)
        features = body.eval()(x).shape[1]
        layers = [*block(2 * features, 8, bias=bias), nn.ReLU(), *block(8, 2, bias=bias)]
        learner = randomised(nn.Sequential(body, head(*layers)))
        it = recognise(learner.state_dict())
        assert (it.system, it.architecture) == ("fast.ai 1" if bias else "fast.ai 2", name)
        got = assemble(it.architecture, it.head, it.tensors)(x)
        assert torch.allclose(got, learner(x), rtol=1e-4, atol=1e-5)


RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]
RESNETS += ["resnext101_64x4d"]


@pytest.mark.parametrize("architecture", RESNETS)
def test_resnets_of_0_7_are_recognised(architecture: str) -> None:
    """By their blocks, with whatever head of fast.ai follows."""
    with torch.device("meta"):
        theirs = models.get_model(architecture).state_dict()
    tensors = {}
    for name, tensor in theirs.items():
        top, _, rest = name.partition(".")
        if top.startswith("layer"):
            tensors[f"{int(top[5:]) + 3}.{rest}"] = tensor
        elif top != "fc":
            tensors[f"{0 if top == 'conv1' else 1}.{rest}"] = tensor
    tensors["11.weight"] = torch.zeros(3, 2 * theirs["fc.weight"].shape[1])
    it = recognise(tensors)
    assert (it.system, it.architecture) == ("fast.ai 0.7", architecture)
    assert (it.head, it.classes) == (("concat_pool", "linear"), 3)
    assert it.tensors.keys() - {"head.1.weight"} == theirs.keys() - {"fc.weight", "fc.bias"}


def test_the_resnext101_of_0_7_is_recognised() -> None:
    """Its 32 groups of 4 are none of torchvision's names."""
    with torch.device("meta"):
        block_ = models.resnet.Bottleneck
        whole = models.ResNet(block_, [3, 4, 23, 3], groups=32, width_per_group=4)
        body = nn.Sequential(*list(whole.children())[:-2])
        it = recognise(nn.Sequential(body, head(*block(4096, 2))).state_dict())
    assert it.architecture == "resnext101_32x4d"


# --- what is refused, and what is told -----------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"0.weight": (4096,), "2.weight": (2, 4096)}, "set learn.precompute = False"),
        (
            {"0.model.conv1.weight": (64, 3, 7, 7), "1.2.weight": (2, 1024)},
            "its body is one of timm's",
        ),
        (
            {"0.0.0.weight": (32, 3, 3, 3), "0.0.1.weight": (32,), "1.4.weight": (2, 1024)},
            "of fast.ai 2, but its body is of no known architecture: it begins with 0.0.weight"
            " (32, 3, 3, 3)",
        ),
        ({"3.weight": (32, 3, 3, 3)}, "its weights are of no known architecture"),
    ],
    ids=["head alone", "timm", "xresnet", "neither"],
)
def test_what_cannot_be_served_is_told_and_what_could_be(
    tensors: dict[str, tuple[int, ...]], words: str
) -> None:
    """The message says what was found and what is known or what to do."""
    with pytest.raises(CheckpointError) as caught:
        recognise({name: torch.zeros(shape) for name, shape in tensors.items()})
    assert words in str(caught.value)
    assert ("known are alexnet, " in str(caught.value)) == ("no known architecture" in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"1.2.weight": (1500,)}, "its head takes 1500 features, expected 512 or twice as many"),
        ({"1.3.weight": (3, 3, 3)}, "layer 3 of its head is neither Linear nor BatchNorm"),
        ({"1.4.weight": (512,), "1.4.running_mean": (512,), "1.8.weight": None}, "no Linear layer"),
    ],
    ids=["width", "kind", "no Linear"],
)
def test_a_head_that_fastai_does_not_make_is_refused(
    changes: dict[str, tuple[int, ...] | None], words: str
) -> None:
    """Nothing is guessed about layers of other kinds."""
    body = nn.Sequential(*list(models.resnet18().children())[:-2])
    tensors = nn.Sequential(body, HEADS["default of 2"]).state_dict()
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=words):
        recognise(tensors)


def test_it_is_told_where_fastai_2_would_not_normalise() -> None:
    """It does so by itself for some architectures only; the file does not say."""
    assert found("2").doubt is not None
    assert "--mean 0,0,0 --std 1,1,1" in str(found("2").doubt)
    assert found("1").doubt is None
    body = nn.Sequential(*list(models.resnet18().children())[:-2])
    assert recognise(nn.Sequential(body, HEADS["default of 2"]).state_dict()).doubt is None
