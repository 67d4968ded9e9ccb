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
    from sparseflow.doctor.checksums import damaged_files
    from sparseflow.store.manifest import Manifest

    manifest = Manifest.load(arguments.store)
    manifest.require_all_parts(arguments.store)
    found = damaged_files(arguments.store, manifest, manifest.files, quiet=arguments.quiet)
    damaged = {name: str(error) for name, error in found.items()}
    if not arguments.json:
        for text in damaged.values():
            print(text)
        print(f"{len(manifest.files) - len(damaged)} of {len(manifest.files)} files are as they were written")
    return {"ok": not damaged, "files": len(manifest.files), "damaged": damaged}
