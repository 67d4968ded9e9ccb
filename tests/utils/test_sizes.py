"""Sizes as people write them."""

import pytest

from sparseflow.errors import BadRequest
from sparseflow.utils.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 << 30), ("1.5GiB", 3 << 29), ("512MiB", 1 << 29), ("64 KiB", 1 << 16), ("1TiB", 1 << 40), (7, 7)],
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["lots", "6", "6GB", "", "GiB", "-1GiB", "0GiB", "nanGiB", "1e400GiB", "1 2GiB", 0, -5]
)
def test_what_is_no_size_is_refused_with_an_example(text: str | int) -> None:
    with pytest.raises(BadRequest, match="such as 6GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(100, "0.1KiB"), (1 << 20, "1MiB"), (3 << 29, "1.5GiB"), (1000 << 20, "0.98GiB"), (999 << 20, "999MiB")],
)
def test_sizes_are_written(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
