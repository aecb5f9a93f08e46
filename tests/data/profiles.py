"""Colour profiles and image files in memory, for tests."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, ImageCms

Point = tuple[float, float, float]
PRIMARIES: dict[str, tuple[Point, Point, Point, float]] = {  # XYZ under D50, and the gamma
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), 2.2),
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.19921875),
    "ProPhoto RGB": ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82490), 1.8),
}
SRGB = ImageCms.createProfile("sRGB")


def profile(name: str, space: bytes = b"RGB ") -> bytes:
    """A minimal ICC profile of version 2."""
    red, green, blue, gamma = PRIMARIES[name]

    def numbers(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + b"\0" * 79,
        b"cprt": b"text\0\0\0\0none\0",
    }
    tags |= {tag: b"XYZ \0\0\0\0" + numbers(*point) for tag, point in
             ((b"wtpt", white), (b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))}  # fmt: skip
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC", b"kTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    head = struct.pack(">I4sI", 128 + len(table) + len(body), b"lcms", 0x02400000) + b"mntr" + space + b"XYZ "
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + numbers(*white)
    return head.ljust(128, b"\0") + table + body


def stream(image: Image.Image, form: str = "PNG", **options: object) -> io.BytesIO:
    found = io.BytesIO()
    image.save(found, form, **options)
    found.seek(0)
    return found


def with_transparent_level(png: io.BytesIO, level: int) -> io.BytesIO:
    """A grey PNG with a tRNS chunk; older releases of Pillow do not write it for 16 bits."""
    data, chunk = png.getvalue(), b"tRNS" + struct.pack(">H", level)
    place = data.index(b"IDAT") - 4
    trns = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return io.BytesIO(data[:place] + trns + data[place:])
