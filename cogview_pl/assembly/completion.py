"""Images to complete, with their prompts: those of `images=`, or validation images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.assembly.image_data import validation_images
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel
from cogview_pl.data.config import DataConfig
from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.image_folders.layout import read_folder
from cogview_pl.data.image_folders.listed import Fields
from cogview_pl.data.input_images import FirstImages, InputImages
from cogview_pl.errors import UserError
from cogview_pl.generation.codes import encode_images
from cogview_pl.generation.completion import check_algorithm, is_prefix, known_codes, mask_of, without_the_rest
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import GivenImages, image_files
from cogview_pl.vocab import CodeSlot

_log = logging.getLogger(__name__)


class Completion:
    """Images to complete: their prompts, and their codes outside the mask.

    Args:
        images: the images; records have prompts.
        numbers: those of them that are completed, in order.
        mask: bool `(y, x)`, True where codes are generated.
        tokenizer: encodes them.
        batch_size: images that are encoded together.
    """

    def __init__(
        self,
        images: InputImages,
        numbers: Sequence[int],
        mask: Tensor,
        tokenizer: ImageTokenizer,
        batch_size: int,
    ) -> None:
        self._images, self._numbers = images, numbers
        self._mask = mask
        self._tokenizer, self._batch_size = tokenizer, batch_size

    @property
    def num_generated(self) -> int:
        """Codes that are generated for an image."""
        return int(self._mask.sum())

    @property
    def prompts(self) -> list[str]:
        """Prompts of the images."""
        return [self._images.record(number)["prompt"] for number in self._numbers]

    def source(self, place: int) -> str:
        """File of the image at a place."""
        return self._images.record(self._numbers[place])["file"]

    def known(self, places: Sequence[int]) -> Tensor:
        """Given codes of the images at some places, int64 `(P, y, x)`, and `TO_SAMPLE` where the mask is True.

        Raises:
            UserError: the images have another size than those of the model.
        """
        codes = encode_images([self._pixels(place) for place in places], self._tokenizer.model, self._batch_size)
        if codes.shape[1:] != self._mask.shape:
            found, wanted = ("x".join(map(str, shape)) for shape in (codes.shape[1:], self._mask.shape))
            raise UserError(f"{self._images.source}: images of {found} codes, the model takes {wanted}")
        return known_codes(codes, self._mask)

    def shown(self, place: int) -> Image.Image:
        """The given part of the image at a place."""
        return to_pil_image(without_the_rest(self._pixels(place), self._mask))

    def _pixels(self, place: int) -> Tensor:
        try:
            return self._images.read(self._numbers[place])
        except SampleError as error:  # it could be read when the run began
            raise UserError(f"{self._images.source}: {self.source(place)}: {error}") from None

    def inputs(self) -> dict[str, str]:
        """Fingerprints of images and mask; a resumed run compares them."""
        mask = Fingerprint("mask")
        mask.add(self._mask.tolist())
        return {self._images.source.partition("=")[0]: self._images.fingerprint(), "complete": mask.hexdigest()}


def completion_mask(model: SequenceModel, options: GenerationOptions) -> Tensor:
    """The mask of the options, bool `(y, x)`, True where codes are generated.

    Raises:
        UserError: see `mask_of` and `check_algorithm`; or `top_n` where nothing ranks the images.
    """
    target = model.template.target
    assert isinstance(target, CodeSlot)
    mask = mask_of(options.complete, target.grid, model.image_tokenizer.settings["image_size"])
    check_algorithm(mask, options.sampler)
    if options.top_n is not None and options.rerank_with is None and is_prefix(mask):
        raise UserError(
            f"top_n={options.top_n} keeps the best images, and nothing ranks them: no given code follows a generated "
            "one; set rerank_with"
        )
    return mask


def readable_images(images: InputImages) -> list[int]:
    """Numbers of the images that can be read; says how many are left out, and raises UserError if all are."""
    images.require_readable()
    readable: list[int] = []
    left_out: list[dict[str, str]] = []
    with Bar("read", len(images), "images") as bar:
        for number in range(len(images)):
            found = images.read_some([number])
            readable += found.numbers
            left_out += found.skipped
            bar.update(1)
    if left_out:
        first = f"{left_out[0]['file']}: {left_out[0]['reason']}"
        _log.warning("left out: %d images that cannot be read (first: %s)", len(left_out), first)
    return readable


def images_to_complete(
    images: object, prompts: Sequence[str] | None, data: DataConfig, count: int, size: int
) -> InputImages:
    """The images that the user gives, or the first `count` validation images, with a prompt for each.

    Args:
        images: value of the key; None: validation images, whose captions are the prompts.
        prompts: one for all images, or one for each; None: the captions of the folder in `images`.
        data: the data set of the validation images.
        count: largest number of validation images.
        size: edge of the images in pixels.

    Raises:
        UserError: there are no images; prompts are missing, or there are too few or too many.
    """
    if images is None:
        if prompts is not None:
            raise UserError(
                "complete: validation images have their captions as prompts; set images, or leave prompts out"
            )
        return FirstImages(validation_images(data), count, prompts=True)
    if prompts is None:
        return _captioned_folder(images, getattr(data, "caption_field", None), size)
    files = image_files(images)
    if len(prompts) not in (1, len(files)):
        raise UserError(
            f"prompts: {len(prompts)} for {len(files)} images of images={images}; give one, or one for each of them"
        )
    every = list(prompts) * (len(files) if len(prompts) == 1 else 1)
    records = [{"file": str(file), "prompt": text} for file, text in zip(files, every, strict=True)]
    return GivenImages(f"images={images}", records, Path(), size)


def _captioned_folder(images: object, caption_field: str | None, size: int) -> GivenImages:
    """The images of a folder with their first captions."""
    if not isinstance(images, str) or not Path(images).is_dir():
        raise UserError(
            f"images={images}: completion needs prompts; set prompts to one for all images or one for each, or images "
            "to a folder with captions"
        )
    found = read_folder(Path(images), Fields(caption=caption_field), None, "images")
    for note in found.notes:
        _log.info("%s", note)
    listed = [image for image in found.images if not image.problem]
    if any(image.span is not None for image in listed):
        raise UserError(f"images={images}: its images are in archives; give a folder of image files")
    records = [{"file": str(Path(images, image.file)), "prompt": image.captions[0]} for image in listed]
    lacking = len(found.images) - len(listed)
    if lacking:
        _log.warning("left out: %d images of images=%s without a caption", lacking, images)
    return GivenImages(f"images={images}", records, Path(), size)
