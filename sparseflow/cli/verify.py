"""Compare every file of a store with its checksum."""

import argparse
from pathlib import Path

from sparseflow.cli.arguments import add_quiet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE"""
    parser.add_argument("store", type=Path, metavar="STORE", help="as `sparseflow convert` makes it")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Name every file that differs, not only the first."""
    from sparseflow.errors import DiskError
    from sparseflow.store.manifest import Manifest, check_content
    from sparseflow.utils.progress import OF_BYTES, progress

    manifest = Manifest.load(arguments.store)
    manifest.require_all_parts(arguments.store)
    damaged = {}
    with progress(desc="verify", quiet=arguments.quiet, total=manifest.nbytes_under(""), **OF_BYTES) as bar:
        for name, entry in manifest.files.items():
            try:
                check_content(arguments.store, name, entry)
            except DiskError as error:
                damaged[name] = str(error)
            bar.update(entry.nbytes)
    if not arguments.json:
        for text in damaged.values():
            print(text)
        print(f"{len(manifest.files) - len(damaged)} of {len(manifest.files)} files are as they were written")
    return {"ok": not damaged, "files": len(manifest.files), "damaged": damaged}
