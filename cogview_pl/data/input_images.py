"""Images that a task works through in order; each is read when it is needed, and none is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS


class ReadImages(NamedTuple):
    """Some images that can be read, and the records of those that cannot."""

    numbers: list[int]
    images: list[Tensor]
    """uint8 `(3, Y, X)`, one for each number."""
    skipped: list[dict[str, str]]
    """Records of unreadable images, with the `reason`."""


class InputImages(ABC):
    """Numbered images, each with a record that names it in lists.

    Args:
        source: key and value of the configuration that name the images, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, number: int) -> dict[str, str]:
        """`file`, which names the image, and `prompt`, if it has one."""

    @abstractmethod
    def read(self, number: int) -> Tensor:
        """An image, uint8 `(3, Y, X)`; raises SampleError if it cannot be used."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes with the images; a resumed run compares it."""

    def read_some(self, numbers: Iterable[int]) -> ReadImages:
        """Read several images."""
        found = ReadImages([], [], [])
        for number in numbers:
            SIGNALS.check()
            try:
                image = self.read(number)
            except SampleError as error:
                found.skipped.append({**self.record(number), "reason": str(error)})
            else:
                found.numbers.append(number)
                found.images.append(image)
        return found

    def require_readable(self) -> None:
        """Raises UserError if none of the images can be read; reads those before the first that can."""
        first = ""
        for number in range(len(self)):
            _, images, skipped = self.read_some([number])
            if images:
                return
            first = first or f"{skipped[0]['file']}: {skipped[0]['reason']}"
        raise UserError(f"{self.source}: none of the {len(self)} images can be read (first: {first})")


class FirstImages(InputImages):
    """The first images of a data set.

    Args:
        images: the data set.
        count: largest number of images.
        prompts: whether records have the captions as prompts.
    """

    def __init__(self, images: CaptionedImages, count: int, *, prompts: bool = False) -> None:
        super().__init__("data")
        self._images = images
        self._prompts = prompts
        self._count = min(count, len(images))

    def __len__(self) -> int:
        return self._count

    def record(self, number: int) -> dict[str, str]:
        named = {"file": self._images.key(number)}
        return {"prompt": self.text(number), **named} if self._prompts else named

    def read(self, number: int) -> Tensor:
        sample = self._images[number]
        if isinstance(sample, Skipped):
            raise SampleError(sample.reason)
        return sample.image

    def text(self, number: int) -> str:
        """The caption of an image; it may be empty if the image cannot be read."""
        return self._images.text(number)

    def fingerprint(self) -> str:
        return self._images.fingerprint()


class FirstSources(FirstImages):
    """The source images of the first pairs of a data set, with their instructions as prompts.

    Args:
        pairs: a data set whose samples have a further image.
        count: largest number of pairs.
        field: name of the source image.
    """

    def __init__(self, pairs: CaptionedImages, count: int, field: str) -> None:
        super().__init__(pairs, count, prompts=True)
        self.pairs = pairs
        self._field = field

    def read(self, number: int) -> Tensor:
        return self._pair(number).image_of(self._field)

    def truth(self, number: int) -> Tensor:
        return self._pair(number).image

    def _pair(self, number: int) -> ImageSample:
        sample = self.pairs[number]
        if isinstance(sample, Skipped):
            raise SampleError(sample.reason)
        return sample


class EachPrompt(InputImages):
    """Images, each with several prompts, several times over: prompt by prompt, image by image.

    Args:
        images: the images.
        prompts: prompts of every image; None: each image has the prompt of its record.
        times: how often each image occurs with each prompt.
    """

    def __init__(self, images: InputImages, prompts: Sequence[str] | None, times: int) -> None:
        super().__init__(images.source)
        self.images = images
        self._prompts = prompts
        self._times = times
        self._each = times * (1 if prompts is None else len(prompts))

    def __len__(self) -> int:
        return len(self.images) * self._each

    def place(self, number: int) -> int:
        """Number of the image."""
        return number // self._each

    def record(self, number: int) -> dict[str, str]:
        image, rest = divmod(number, self._each)
        found = self.images.record(image)
        return found if self._prompts is None else {"prompt": self._prompts[rest // self._times], "file": found["file"]}

    def read(self, number: int) -> Tensor:
        return self.images.read(self.place(number))

    def truth(self, number: int) -> Tensor | None:
        """What the prompt is to make of the image, uint8 `(3, Y, X)`: the target of its pair; None where unknown."""
        if self._prompts is None and isinstance(self.images, FirstSources):
            return self.images.truth(self.place(number))
        return None

    def fingerprint(self) -> str:
        return self.images.fingerprint()
