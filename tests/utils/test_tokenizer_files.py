"""Tokenizer files that anybody may have made: a tokenizer, or one error; no code of theirs is run."""

import json
from pathlib import Path

import pytest

from sparseflow.errors import DiskError
from sparseflow.utils.tokenizer import tokenizer_of


@pytest.fixture
def files(demo_model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in demo_model.glob("*.json")}


def test_tokenizer_of_a_model_is_made(files: dict[str, bytes]) -> None:
    assert tokenizer_of(files)("In the beginning").input_ids


def test_model_without_one_says_how_to_add_it() -> None:
    with pytest.raises(DiskError, match="put one into the checkpoint folder"):
        tokenizer_of({"config.json": b"{}"})


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"model": 1}'], ids=lambda c: repr(c[:9])
)
def test_file_that_is_none_is_one_error(content: bytes, files: dict[str, bytes]) -> None:
    with pytest.raises(DiskError, match="make no tokenizer") as caught:
        tokenizer_of(files | {"tokenizer.json": content})
    assert len(str(caught.value)) < 1000


def test_code_that_comes_along_is_not_run(files: dict[str, bytes], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    code = f"open({str(proof)!r}, 'w').close()\nclass Tok: pass\n".encode()
    settings = json.dumps({"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", "tok.Tok"]}}).encode()
    try:
        tokenizer_of(files | {"tok.py": code, "tokenizer_config.json": settings})
    except DiskError as error:
        assert "make no tokenizer" in str(error)  # noqa: PT017  either will do
    assert not proof.exists()


def test_files_of_folders_are_left_out(files: dict[str, bytes]) -> None:
    assert tokenizer_of(files | {"predictors/x": b"", "../../outside": b""})("a").input_ids
