"""What a conversion has finished so far, so that a rerun after a kill goes on from there.

A line of JSON for each finished file, after a first line that identifies the conversion.
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparseflow.errors import DiskError
from sparseflow.store.manifest import check_content
from sparseflow.store.shard_format import FileEntry

_NAME = "journal.jsonl"


class Journal:
    """The journal of one folder. Nothing is written before `start`."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """
        Args:
            identity: what the finished files depend on; those of another identity do not count.
        """
        self._folder = folder
        self._identity = identity
        self.finished = self._read()

    def _read(self) -> dict[str, FileEntry]:
        """Files recorded for this identity whose bytes are still those written."""
        try:
            lines = [line for line in (self._folder / _NAME).read_text(encoding="utf-8").splitlines() if line]
            if not lines or json.loads(lines[0]) != self._identity:
                return {}
        except (FileNotFoundError, ValueError):
            return {}
        finished: dict[str, FileEntry] = {}
        for line in lines[1:]:
            with suppress(ValueError, KeyError, DiskError):  # cut short by a kill, or changed since: made again
                record = json.loads(line)
                entry = FileEntry(record["nbytes"], record["xxh3_64"])
                check_content(self._folder, record["name"], entry)
                finished[record["name"]] = entry
        return finished

    def start(self) -> None:
        """Go on, or empty the folder and begin."""
        if not self.finished:
            for entry in self._folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self._append(self._identity)

    def record(self, name: str, entry: FileEntry) -> None:
        """A file is whole and on disk."""
        self.finished[name] = entry
        self._append({"name": name, **asdict(entry)})

    def remove(self) -> None:
        """All is done."""
        (self._folder / _NAME).unlink()

    def _append(self, record: dict[str, Any]) -> None:
        # The newline comes first, so that a line cut short by a kill spoils none but itself.
        with open(self._folder / _NAME, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(record, separators=(",", ":")))
            file.flush()
            os.fsync(file.fileno())
