"""Pictures to classes with EfficientNet-lite, decoded ahead of the model and bounded before a pixel is decoded."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from serve.cache import CacheFull, build_once
from serve.errors import InvalidInput, LoadError, PayloadTooLarge, RoundhouseError, UnsupportedMedia
from serve.models.base import Item, LoadContext, Signature, TensorSpec
from serve.models.devices import use_threads
from serve.models.efficientnet import EfficientNetLite
from serve.models.imagenet import load_labels
from serve.spec import ClassificationOptions

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

#: 50 megapixels: more than cameras give, and 150 MB as RGB for each picture that is decoded at a time.
_MAX_PIXELS = 50_000_000

#: Pixels by which the resized picture's shorter side exceeds the crop, as the weights were trained.
_CROP_MARGIN = 32

#: Longer side over shorter side that is resized whole.
_LONGEST_RATIO = 32

#: Pictures computed together on a CPU: the activations of more leave its caches, and each picture takes longer.
_CPU_PICTURES = 2

#: An 8x8 PNG.
_EXAMPLE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQMAAAD+wSzIAAAABlBMVEXIeAAoWjzIG1AZAAAAGElEQVR42mNgYGBgsGFiYGJgYmBg"
    "YGAAAALUAEMQ6XlWAAAAAElFTkSuQmCC"
)


class ImageClassification:
    """A `Model`: `image` BYTES [-1] -> `label` BYTES, `score` FP32, `class_id` INT32, each [-1, top_k], best first."""

    signature: Signature

    def load(self, context: LoadContext) -> None:
        """Load the file that the source names, or the only `.safetensors` or `.pth` in its folder or in `models` there.

        Raises:
            LoadError: There is no such file or more than one, its weights are of another network, or the labels do
                not fit them.
        """
        options: ClassificationOptions = context.options
        use_threads(context.threads)
        context.progress("weights", 0, 1)
        state = _read_weights(context.file or _weights_file(context.folder), context.cache_dir)
        dtype = getattr(torch, context.dtype)
        self._network = EfficientNetLite(state, device=context.device, dtype=dtype)
        self._labels = load_labels(context.folder / options.labels if options.labels else None)
        _check_classes(options, labels=len(self._labels), classes=self._network.classes)
        self._top_k = options.top_k
        self._together = _CPU_PICTURES if context.device == "cpu" else context.max_batch_size
        self.signature = _signature(options.top_k)
        context.progress("weights", 1, 1)

    def prepare(self, item: Item) -> np.ndarray:
        """Return the picture as the network takes it: RGB, uint8 [resolution, resolution, 3].

        Raises:
            InvalidInput: The picture is damaged (`UnsupportedMedia`: no picture; `PayloadTooLarge`: too many pixels).
        """
        return decode(item["image"], resolution=self._network.variant.resolution)

    def predict(self, batch: Sequence[np.ndarray]) -> list[Mapping[str, Any]]:
        """Return `label` (list of str), `score` (float32 [top_k]) and `class_id` (int32 [top_k]) of each picture."""
        with torch.inference_mode():
            parts = [
                torch.from_numpy(np.stack(batch[start : start + self._together]))
                for start in range(0, len(batch), self._together)
            ]
            logits = torch.cat([self._network(part) for part in parts])
            scores, classes = logits.softmax(dim=1).topk(self._top_k, dim=1)
        rows = zip(scores.cpu().numpy(), classes.to(torch.int32).cpu().numpy(), strict=True)
        return [
            {"label": [self._labels[index] for index in row], "score": score, "class_id": row} for score, row in rows
        ]


def decode(content: Any, *, resolution: int) -> np.ndarray:
    """Return the centre of an encoded picture, uint8 [resolution, resolution, 3], turned as its camera says.

    The picture is resized bicubically until its shorter side is `resolution` + 32, of which the centre is taken.

    Raises:
        InvalidInput: As `ImageClassification.prepare`.
    """
    if not isinstance(content, bytes) or not content:
        found = "it is empty" if content == b"" else f"a value of type {type(content).__name__} was found"
        raise InvalidInput(f"the bytes of an encoded picture are wanted; {found}", place="image")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            _check_pixels(picture)
            return _centre(_rgb(ImageOps.exif_transpose(picture)), resolution)
    except RoundhouseError:
        raise
    except Image.DecompressionBombError as error:
        raise PayloadTooLarge(f"the picture is too large: {error}", place="image") from error
    except UnidentifiedImageError as error:
        message = f"a picture ({', '.join(_FORMATS)}) is wanted; the {len(content)} bytes begin with {content[:12]!r}"
        raise UnsupportedMedia(message, place="image") from error
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        raise InvalidInput(f"the picture is damaged or cut short: {error}", place="image") from error


def _check_pixels(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > _MAX_PIXELS:
        raise PayloadTooLarge(
            f"the picture has {width} x {height} pixels; {_MAX_PIXELS:,} are the most that are decoded", place="image"
        )


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # conversion would clip 16 bits to 8 instead of scaling them
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _centre(picture: Image.Image, resolution: int) -> np.ndarray:
    picture = _without_ends(picture)
    shorter = resolution + _CROP_MARGIN
    width, height = (max(shorter, int(shorter * side / min(picture.size))) for side in picture.size)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + resolution, top + resolution)))


def _without_ends(picture: Image.Image) -> Image.Image:
    """Cut the ends off a very long picture, which would grow without bound; only the centre is used."""
    width, height = picture.size
    longest = _LONGEST_RATIO * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return picture.crop((left, top, width - left, height - top)) if left or top else picture


def _weights_file(folder: Path) -> Path:
    for pattern in ("*.safetensors", "*.pth"):
        found = sorted(folder.glob(pattern)) or sorted(folder.glob(f"models/{pattern}"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise LoadError(f"{folder} holds several weights ({names}); let the source name one of them")
    raise LoadError(f"{folder} holds no .safetensors or .pth file, nor does its folder models")


def _read_weights(path: Path, cache_dir: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file; a pickled one is converted once, so that it is never unpickled again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    def convert(folder: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")

    try:
        if path.suffix != ".safetensors":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            path = build_once(cache_dir, f"converted/{digest}", convert) / "model.safetensors"
        return load_file(path)
    except CacheFull:
        raise
    except (OSError, SafetensorError) as error:
        raise LoadError(f"weights cannot be read from {path}: {error}") from error
    except Exception as error:  # unpickling a damaged file raises nearly anything
        raise LoadError(f"{path} holds no plain weights: {str(error).splitlines()[0]}") from error


def _check_classes(options: ClassificationOptions, *, labels: int, classes: int) -> None:
    if labels != classes:
        fix = f"correct {options.labels}" if options.labels else "name them in options.labels"
        raise LoadError(f"the model has {classes} classes and there are {labels} labels; {fix}")
    if options.top_k > classes:
        raise LoadError(f"options.top_k is {options.top_k}; the model has {classes} classes")


def _signature(top_k: int) -> Signature:
    formats = ", ".join(_FORMATS[:-1]) + f" or {_FORMATS[-1]}"
    return Signature(
        inputs=(TensorSpec("image", "BYTES", (-1,), f"A picture as the bytes of a {formats} file.", content="base64"),),
        outputs=(
            TensorSpec("label", "BYTES", (-1, top_k), "Names of the most probable classes, best first."),
            TensorSpec("score", "FP32", (-1, top_k), "Their probabilities."),
            TensorSpec("class_id", "INT32", (-1, top_k), "Their numbers, counted from 0."),
        ),
        example={"image": _EXAMPLE},
    )
