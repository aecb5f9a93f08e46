"""Several views of each image: random crops and flips, as samples of their own."""

from __future__ import annotations

from collections.abc import Iterator

from cogview_pl.data.images import ImageFileDataset
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.vocab.roles import CAPTION


class Views(CaptionedImages):
    """Views of the images of a data set; those of an image come one after the other.

    The key of the first view is that of the image; further ones add `#2`, `#3`, …

    Args:
        images: the data set.
        count: views of each image.
    """

    def __init__(self, images: ImageFileDataset, count: int) -> None:
        self._images = images
        self._count = count

    def __len__(self) -> int:
        return len(self._images) * self._count

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        image, view = divmod(range(len(self))[index], self._count)
        sample = self._images.view(image, view)
        return sample._replace(key=_key(sample.key, view))

    def key(self, index: int) -> str:
        image, view = divmod(index, self._count)
        return _key(self._images.key(image), view)

    def text(self, index: int, field: str = CAPTION) -> str:
        return self._images.text(index // self._count, field)

    def known_bad(self) -> Iterator[Skipped]:
        for bad in self._images.known_bad():
            for view in range(self._count):
                yield bad._replace(key=_key(bad.key, view))

    def notes(self) -> list[str]:
        return self._images.notes()

    def fingerprint(self) -> str:
        """That of the images; it covers the number of views, which is an option of decoding."""
        return self._images.fingerprint()


def _key(key: str, view: int) -> str:
    return f"{key}#{view + 1}" if view else key
