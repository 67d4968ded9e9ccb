"""Sizes as people write them."""

import pytest

from sparseflow.errors import BadRequest
from sparseflow.utils.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GiB", 6 << 30),
        ("6GB", 6 * 10**9),
        ("6G", 6 << 30),
        ("6g", 6 << 30),
        ("6gib", 6 << 30),
        ("6gb", 6 * 10**9),
        ("1.5GiB", 3 << 29),
        ("512M", 1 << 29),
        ("512MiB", 1 << 29),
        ("64 KiB", 1 << 16),
        ("0.5k", 512),
        ("1TiB", 1 << 40),
        ("6442450944", 6 << 30),
        (" 7 ", 7),
        (7, 7),
    ],
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        *("lots", "", "GiB", "-1GiB", "-7", "0GiB", "0", "nanGiB", "1e400GiB", "1 2GiB", "6Gi", "6iB", "6PiB", "1.5"),
        *("6 GiBs", "1,5GiB", "\u00b2GiB", "\u0663", "9" * 5000, "9" * 400 + "GiB", 0, -5),
    ],
)
def test_what_is_no_size_is_refused_with_examples(text: str | int) -> None:
    with pytest.raises(BadRequest, match=r"such as 6GiB or 6G \(2\^30\), 6GB \(10\^9\)"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(100, "0.1KiB"), (1 << 20, "1MiB"), (3 << 29, "1.5GiB"), (1000 << 20, "0.98GiB"), (999 << 20, "999MiB")],
)
def test_sizes_are_written(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
