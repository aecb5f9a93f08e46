"""Which members of a shard are one sample.

WebDataset's rule: members share a key, their path up to the first dot of the base name. Names with dots of their own
break it: `scan.000.jpg … scan.059.jpg` would be one sample. So where a key has no `KEY.jpg` with a text, names are
read up to their last dot: each image with a text of the same name is a sample, and so is each image of a key that has
no text at all. An image of another name (`a.input.jpg`) belongs to the text `a.txt` if it is the only one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from cogview_pl.data.shards.tar_headers import SEVERAL_IMAGES, Span

Members = Mapping[str, Span]
"""Places of members by extension in lower case."""


def samples_of(key: str, members: Members, image_extensions: Collection[str]) -> Iterator[tuple[str, Members]]:
    """The samples among the members whose names are equal up to the first dot.

    Args:
        key: path up to the first dot of the base name.
        members: by all that follows this dot.
        image_extensions: extensions of images.

    Yields:
        Key and members of each sample, at least one, in the order of their first members. The image is
        `SEVERAL_IMAGES` where a text could belong to several images.
    """
    if not any("." in rest for rest in members):
        yield key, members
        return
    named: dict[str, dict[str, Span]] = {}  # by what a name has between its first and its last dot
    for rest, place in members.items():
        middle, _, extension = rest.rpartition(".")
        named.setdefault(middle, {})[extension] = place
    plain = named.pop("", {})
    has_text = any(extension not in image_extensions for extension in plain)
    if has_text and any(extension in image_extensions for extension in plain):
        yield key, members
        return
    images = {middle: found for middle, found in named.items() if any(one in image_extensions for one in found)}
    shared = [middle for middle, found in images.items() if has_text and all(one in image_extensions for one in found)]
    own = [] if len(shared) == len(images) else [middle for middle in named if middle not in shared]
    given: dict[str, dict[str, Span]] = {}
    for rest, place in members.items():
        middle, _, extension = rest.rpartition(".")
        if middle in own:
            given.setdefault(f"{key}.{middle}", {})[extension] = place
        elif middle in shared:
            of_key = given.setdefault(key, {})
            of_key[extension if len(shared) == 1 else rest] = place
            if len(shared) > 1:
                of_key[extension] = SEVERAL_IMAGES
        else:
            given.setdefault(key, {})[rest] = place
    yield from given.items()
