"""A store: whether it is whole, how it would be read here, and how much of it memory holds."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from sparseflow.doctor.checksums import MADE_ANEW, damaged_files
from sparseflow.doctor.finding import Check, Finding, Found, Group, of_error
from sparseflow.engine.memory_plan import plan_memory
from sparseflow.engine.reading import open_reading
from sparseflow.engine.shard_files import ShardFiles
from sparseflow.errors import DiskError, NotEnoughMemory, SparseFlowError
from sparseflow.store.manifest import Manifest, check_size
from sparseflow.utils.sizes import format_size

_DEADLINE_S = 40.0


def group(store: Path, *, full: bool, quiet: bool) -> Group:
    """full: read every byte, too. quiet: without a bar."""
    checks = [Check("store", lambda: look(store), _DEADLINE_S)]
    if full:
        checks.append(Check("checksums", lambda: compare(store, quiet=quiet), deadline_s=None))
    return Group(f"Store {store}", checks)


def look(store: Path) -> Found:
    """Its manifest, and what that tells to look at."""
    try:
        manifest = Manifest.load(store)
        manifest.require_all_parts(store)
    except SparseFlowError as error:
        return Found([of_error("manifest", "problem", error)])
    found = [_manifest(manifest), *files(store, manifest)]
    if all(finding.verdict == "ok" for finding in found):
        found += [reading(store, manifest), memory(store, manifest)]
    return Found(found)


def files(store: Path, manifest: Manifest) -> list[Finding]:
    """Whether each is there, and as long as it was: not what is in it."""
    damaged = _of_other_size(store, manifest, manifest.files)
    if damaged:
        return damaged
    return [Finding("files", "ok", f"{len(manifest.files)} are there, as long as they were; --full compares bytes")]


def compare(store: Path, *, quiet: bool = True) -> Found:
    """Every file with its checksum, but those of which `look` has told."""
    try:
        manifest = Manifest.load(store)
    except SparseFlowError:
        return Found([])  # told already
    whole = [name for name in manifest.files if not _of_other_size(store, manifest, [name])]
    damaged = damaged_files(store, manifest, whole, quiet=quiet)
    if damaged:
        return Found([of_error("file", "problem", error) for error in damaged.values()])
    text = f"{len(whole)} of {len(manifest.files)} files have the bytes that were written"
    return Found([Finding("checksums", "ok", text)])


def reading(store: Path, manifest: Manifest) -> Finding:
    """How neurons would be read that are not in memory."""
    try:
        with closing(open_reading(ShardFiles(store, manifest), "auto")) as opened:
            nbytes = manifest.profile.bundle_nbytes
            rate = opened.speed.bytes_per_s(nbytes) / 1e6
            text = f"{opened.queue.name}, {rate:.0f} MB/s in pieces of {format_size(nbytes)}"
            reasons = opened.reasons
    except DiskError as error:
        return of_error("reading", "problem", error)
    if reasons:
        remedy = "copy the store to a local disk (ext4, xfs), if it is larger than memory"
        return Finding("reading", "note", f"{text}; {', '.join(reasons)}", remedy)
    return Finding("reading", "ok", text)


def memory(store: Path, manifest: Manifest) -> Finding:
    """What `--memory auto` would keep."""
    try:
        plan = plan_memory(store, manifest, "auto")
    except NotEnoughMemory as error:
        return of_error("memory", "problem", error)
    profile = manifest.profile
    if plan.n_slots is None:
        return Finding("memory", "ok", "all of it fits into memory")
    share = plan.n_slots / (profile.num_layers * profile.ffn_dimension)
    text = f"{share:.0%} of the neurons fit into memory, others are read as they are needed"
    return Finding("memory", "note", text, "free memory to read less")


def _manifest(manifest: Manifest) -> Finding:
    profile = manifest.profile
    text = (
        f"{profile.model_identifier}: {profile.num_layers} layers of {profile.ffn_dimension} neurons, "
        f"{profile.hidden_dimension} wide, {profile.dtype}, {format_size(manifest.nbytes_under(''))}, "
        f"{'calibrated' if 'profile.json' in manifest.files else 'not calibrated'}"
    )
    return Finding("manifest", "ok", text)


def _of_other_size(store: Path, manifest: Manifest, names: Iterable[str]) -> list[Finding]:
    """A finding for each file that is not there, or not as long as the manifest says."""
    found = []
    for name in names:
        try:
            check_size(store, name, manifest.files[name])
        except DiskError as error:
            found.append(of_error("file", "problem", error))
        except OSError as error:
            found.append(Finding("file", "problem", f"{store / name}: {error.strerror}", MADE_ANEW))
    return found
