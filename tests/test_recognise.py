"""State_dicts of torchvision's classifiers score as they do there: swiprd.recognise."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from swiprd.architectures import build, torchvision_families, torchvision_names
from swiprd.bundle import BundleError, Preprocessing
from swiprd.checkpoint import CheckpointError
from swiprd.decode import decode
from swiprd.engines import Engine
from swiprd.network import _fold_norms, assemble
from swiprd.preprocess import preprocess
from swiprd.recognise import check_together, recognise, resized, torchvision_preprocessing
from tests.checkpoints import picture
from tests.test_fastai import randomised

pytestmark = pytest.mark.usefixtures("one_thread")

SMALLEST = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
    *("googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5"),
    *("squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32"),
]
"""At least one of each family."""


def network(name: str, **options: Any) -> nn.Module:
    """Return torchvision's own network, with weights of this test's."""
    torch.manual_seed(3)
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "transform_input": True}
    return randomised(models.get_model(name, **options))


def theirs(whole: nn.Module, data: bytes, rules: Any) -> Tensor:
    """Return the outputs that torchvision gives for a file."""
    with torch.inference_mode(), Image.open(io.BytesIO(data)) as image:
        outputs: Tensor = whole(rules(image.convert("RGB")).unsqueeze(0))[0]
    return outputs.softmax(0)


def ours(it: Any, data: bytes, rules: Preprocessing | None = None) -> Tensor:
    """Return the same of the recognised model, its batch norms folded as they are when serving."""
    rules = rules or it.preprocessing
    made = assemble(it.architecture, it.head, it.tensors)
    engine = Engine("eager", "fp32", made)
    with torch.inference_mode():
        _fold_norms(made)
        x = preprocess(decode(data, rules, max_pixels=10**7), rules)
        return engine.run(x)[0].softmax(0)


# --- recognised ----------------------------------------------------------------------------------


def test_no_two_architectures_have_the_same_names_and_shapes() -> None:
    """So that a checkpoint is never taken for another's, whatever its last layer."""
    seen: dict[Any, str] = {}
    for name in torchvision_names():
        state = build(name, {}).state_dict()
        last = list(state)[-1].rpartition(".")[0]
        shapes = frozenset((k, t.shape) for k, t in state.items() if not k.startswith(last))
        assert shapes not in seen, f"{name} and {seen[shapes]}"
        seen[shapes] = name
    assert len(seen) >= 80


def test_networks_that_are_built_are_not_filled_with_numbers() -> None:
    """Which are dropped, and cost as much as all else: normal, uniform and constant ones."""
    aten = torch.ops.aten
    fillers = {aten.fill_, aten.normal_, aten.uniform_, aten.zero_}

    class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
        filled = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.filled += func.overloadpacket in fillers and args[0].is_meta
            return func(*args, **(kwargs or {}))

    with Counted() as counted:  # type: ignore[no-untyped-call]
        for name in NOT_FILLED:
            build(name, {})
            assert counted.filled == 0, name
        nn.Linear(3, 4, device="meta")
    assert counted.filled > 0


NOT_FILLED = (
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "vgg11_bn",
)


def test_the_smallest_are_of_every_family() -> None:
    """What is said below of some holds for all kinds."""
    assert all(set(SMALLEST) & set(family) for family in torchvision_families())


@pytest.mark.parametrize("family", torchvision_families(), ids=lambda family: str(family[0]))
def test_the_last_of_a_family_is_recognised(family: list[str]) -> None:
    """By its shapes alone, among relatives whose tensors have the same names."""
    made = build(family[-1], {}).to("meta")
    it = recognise(made.state_dict())
    assert (it.system, it.architecture, it.head) == ("torchvision", family[-1], None)
    assert it.classes == 1000
    check_together(it, it.preprocessing.crop)


@pytest.mark.parametrize("name", SMALLEST)
def test_the_scores_are_torchvisions(name: str) -> None:
    """With its own transforms, for pictures of several sizes and shapes."""
    whole = network(name, num_classes=3)
    it = recognise(whole.state_dict())
    assert (it.architecture, it.classes) == (name, 3)
    rules = next(iter(models.get_model_weights(name))).transforms()
    for file in ("02_landscape_451x300_rgb.png", "10_exif6.jpg", "61x80.png", "09_rgba.png"):
        data = picture(file)
        assert torch.allclose(ours(it, data), theirs(whole, data, rules), rtol=0, atol=2e-5), file


def test_every_architecture_has_transforms_of_its_own() -> None:
    """What is not in a file has a good default for each."""
    for name in torchvision_names():
        rules = torchvision_preprocessing(name)
        assert rules.crop <= rules.short_side


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_it_is_told_where_an_architecture_normalises_by_itself(name: str) -> None:
    """Whether it does is not in the file."""
    doubt = recognise(build(name, {}).to("meta").state_dict()).doubt
    assert doubt is not None
    assert "--mean 0.485,0.456,0.406" in doubt


def test_other_weights_of_googlenet_are_dropped() -> None:
    """Auxiliary outputs serve training alone; checkpoints carry them all the same."""
    whole = models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
    it = recognise(whole.state_dict())
    assert it.architecture == "googlenet"
    assert not any(name.startswith("aux") for name in it.tensors)


def test_a_vision_transformer_may_have_been_trained_at_another_size() -> None:
    """Its positions tell; the shorter side follows in proportion."""
    with torch.device("meta"):
        whole = models.vit_b_32(image_size=384, num_classes=3)
    it = recognise(whole.state_dict())
    assert (it.preprocessing.crop, it.preprocessing.short_side) == (384, 439)
    check_together(it, 384)
    with pytest.raises(CheckpointError, match="cannot compute with an input of 224 x 224"):
        check_together(it, 224)


def test_names_of_old_densenets_are_known() -> None:
    """Torchvision wrote them once and still reads them."""
    tensors = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor
        for name, tensor in build("densenet121", {}).to("meta").state_dict().items()
    }
    assert any(".norm.1." in name for name in tensors)
    assert recognise(tensors).architecture == "densenet121"


# --- other heads ---------------------------------------------------------------------------------

REPLACED = {
    "resnet18": ("fc", nn.Linear(512, 4)),
    "mobilenet_v2": ("classifier", nn.Linear(1280, 4)),
    "mobilenet_v3_small": ("classifier", nn.Linear(576, 4)),
    "shufflenet_v2_x0_5": ("fc", nn.Sequential(nn.Dropout(0.5), nn.Linear(1024, 4, bias=False))),
    "vit_b_32": ("heads", nn.Linear(768, 4)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_linear_may_stand_in_place_of_the_classifier(name: str) -> None:
    """Bare, or in a Sequential behind a Dropout."""
    whole = network(name)
    child, linear = REPLACED[name]
    setattr(whole, child, linear)
    whole.eval()
    it = recognise(whole.state_dict())
    assert (it.architecture, it.classes) == (name, 4)
    rules = next(iter(models.get_model_weights(name))).transforms()
    data = picture("02_landscape_451x300_rgb.png")
    assert torch.allclose(ours(it, data), theirs(whole, data, rules), rtol=0, atol=2e-5)


def test_a_head_of_several_layers_is_refused() -> None:
    """What stands between its Linears is not in the file."""
    whole = build("resnet18", {})
    whole.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(CheckpointError, match=r"of no known architecture: .*; known are alexnet"):
        recognise(whole.to("meta").state_dict())


def test_a_linear_that_the_features_do_not_fit_is_refused() -> None:
    """Though each part is well-formed for itself."""
    whole = build("resnet18", {})
    whole.fc = nn.Sequential(nn.Linear(500, 2))
    it = recognise(whole.to("meta").state_dict())
    with pytest.raises(CheckpointError, match="cannot compute with an input of 224"):
        check_together(it, 224)


# --- asked for -----------------------------------------------------------------------------------


def test_an_architecture_that_is_asked_for_must_fit() -> None:
    """It is looked for alone, and the error says so."""
    tensors = build("resnet18", {}).to("meta").state_dict()
    assert recognise(tensors, architecture="resnet18").architecture == "resnet18"
    with pytest.raises(CheckpointError, match=r"are not those of resnet34: .*; leave out --arch"):
        recognise(tensors, architecture="resnet34")


def test_an_architecture_that_is_not_known_is_told_with_the_known() -> None:
    """Before anything is built."""
    with pytest.raises(CheckpointError, match="no architecture 'resnet19' is known, expected one"):
        recognise({}, architecture="resnet19")


@pytest.mark.parametrize("name", ["nothing", "resnet18"])
def test_no_network_is_built_of_nothing(name: str) -> None:
    """A bundle without weights is refused with the first that is missing."""
    with pytest.raises(BundleError):
        assemble(name, None, {})


def test_a_size_of_its_own_keeps_the_proportion() -> None:
    """The shorter side is scaled as it is for the usual size."""
    rules = torchvision_preprocessing("resnet18")
    assert (rules.short_side, rules.crop) == (256, 224)
    assert resized(rules, 112) == dataclasses.replace(rules, short_side=128, crop=112)
