"""Every byte of a store against the checksum that was written with it."""

from collections.abc import Collection
from pathlib import Path

from sparseflow.errors import DiskError
from sparseflow.store.manifest import Manifest, check_content
from sparseflow.utils.progress import OF_BYTES, progress

MADE_ANEW = "remove the store and convert the model again"


def damaged_files(store: Path, manifest: Manifest, names: Collection[str], *, quiet: bool) -> dict[str, DiskError]:
    """Of these files, those that are not as they were written, with what to say of each.

    quiet: no bar. Every file is read, whatever is wrong with those before it.
    """
    damaged: dict[str, DiskError] = {}
    total = sum(manifest.files[name].nbytes for name in names)
    with progress(desc="checksums", quiet=quiet, total=total, **OF_BYTES) as bar:
        for name in names:
            try:
                check_content(store, name, manifest.files[name])
            except DiskError as error:
                damaged[name] = error
            except OSError as error:
                damaged[name] = DiskError(f"{store / name}: {error.strerror}; {MADE_ANEW}")
            bar.update(manifest.files[name].nbytes)
    return damaged
