"""The segments of JPEGs: found without decoding, in odd and broken streams, too."""

import io

import numpy as np
import pytest
from PIL import Image

from fasttrain.formats import jpeg
from fasttrain.formats.markers import looks_whole, may_state_orientation, padding, segments, tidied


def picture(**options: object) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((64, 48), 80).save(stream, "JPEG", **options)
    return stream.getvalue()


def with_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": with_exif()}, {"comment": "\xff" * 9}])
def test_the_last_segment_is_the_scan(options: dict) -> None:
    data = picture(**options)
    found = list(segments(data))
    assert found[0] == (0xE0, 2)
    assert [marker for marker, _ in found].count(0xDA) == 1
    assert found[-1] == (0xDA, data.index(b"\xff\xda"))


def test_exif_is_found_before_the_pixels_only() -> None:
    assert may_state_orientation(picture(exif=with_exif()))
    assert not may_state_orientation(picture())
    assert not may_state_orientation(picture() + b"\xff\xe1\0\x08Exif\0\0")
    odd = picture(exif=with_exif())
    assert may_state_orientation(odd[:2] + b"odd" + odd[2:])


def test_xmp_is_found_where_it_speaks_of_an_orientation() -> None:
    upright, turned = picture(xmp=b"<x:xmpmeta/>"), picture(xmp=b'<rdf:Description tiff:Orientation="6"/>')
    assert not may_state_orientation(upright)
    assert not may_state_orientation(picture(comment=b'tiff:Orientation="6"'))
    assert not may_state_orientation(upright + turned)
    assert may_state_orientation(turned)
    assert may_state_orientation(turned[:2] + b"odd" + turned[2:])


def test_a_stream_without_its_end_is_not_whole() -> None:
    data = picture()
    assert looks_whole(data)
    assert looks_whole(data + bytes(20))
    scan = data.index(b"\xff\xda") + 20
    early = data[:scan] + b"\xff\xd9" + data[scan:]
    for broken in (data[:-2], data + bytes(100), data[:scan], early, data[1:], b"\xff\xd8", b""):
        assert not looks_whole(broken)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": with_exif()}, {"comment": "\xff" * 9}])
def test_a_tidied_stream_has_the_same_pixels_and_no_notes(options: dict) -> None:
    data = picture(**options)
    tidy = tidied(data)
    np.testing.assert_array_equal(jpeg.decode(tidy), jpeg.decode(data))
    assert all(marker < 0xE0 for marker, _ in segments(tidy))
    assert tidied(tidy) == tidy
    assert tidied(data[:2] + b"\0odd\xff\0" + data[2:]) == tidy
    for length in range(len(data)):
        tidied(data[:length])  # ends, whatever is missing


def test_padding_is_what_lies_before_the_end_marker() -> None:
    data = picture()
    before = padding(data)
    assert before < 3
    assert padding(data[:-2] + bytes(5) + data[-2:] + bytes(9)) == before + 5
    assert padding(data[:-2] + b"1" + data[-2:]) == 0
    for broken in (data[:-2], data[:9], b""):
        assert padding(broken) == 0
