"""What is told of memory and its limits."""

import json
from typing import Any

import pytest
from child_process import run_python
from looking import by_name, verdicts

from sparseflow.doctor import memory
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.errors import NotEnoughMemory

GIB = 1 << 30

LIMITED = """
import json, resource, sys
from dataclasses import asdict
from sparseflow.doctor import memory
from sparseflow.doctor.finding import Finding
resource.setrlimit(getattr(resource, sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4])))
found = getattr(memory, sys.argv[1])()
print(json.dumps(asdict(found if isinstance(found, Finding) else found.findings[0])))
"""


def under(find: str, limit: str, soft: int, hard: int | None = None) -> dict[str, Any]:
    """What a process finds that has such a limit."""
    told: dict[str, Any] = json.loads(run_python(LIMITED, find, limit, soft, soft if hard is None else hard))
    return told


def test_all_is_found_here_and_facts_are_those_of_the_host() -> None:
    facts: dict[str, Any] = {}
    for check in memory.group().checks:
        found = check.found()
        assert "problem" not in verdicts(found).values()
        facts |= found.facts
    assert set(facts) == {"kernel", "memory_nbytes", "free_nbytes", "memlock_nbytes", "shm"}
    assert facts["memory_nbytes"] >= facts["free_nbytes"] > 0


# --- how much


def test_little_free_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: GIB // 2)
    (found,) = memory.amount().findings
    assert found.verdict == "warning"
    assert found.text.startswith("512MiB of ")


def test_limit_of_a_cgroup_is_a_note_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: GIB)
    found = memory.group_limit()
    assert found.verdict == "note"
    assert found.text.startswith("1GiB by a cgroup")


# --- limits of the process


def test_limited_address_space_is_a_warning() -> None:
    found = under("address_space", "RLIMIT_AS", 64 * GIB)
    assert (found["verdict"], found["remedy"]) == ("warning", "ulimit -v unlimited")
    assert "limited to 64GiB" in found["text"]


def test_limited_locked_memory_is_a_note() -> None:
    found = under("locked_memory", "RLIMIT_MEMLOCK", 65536)
    assert found["verdict"] == "note"
    assert "limited to 64KiB" in found["text"]
    assert "ulimit -l unlimited" in found["remedy"]


@pytest.mark.parametrize(
    ("soft", "hard", "verdict", "remedy"),
    [
        (1024, 1024, "ok", ""),
        (100, 4096, "warning", "ulimit -n 1024"),
        (100, 200, "warning", "ulimit -n 1024, for which root must raise the hard limit (200)"),
    ],
)
def test_few_open_files_are_a_warning(soft: int, hard: int, verdict: str, remedy: str) -> None:
    found = under("open_files", "RLIMIT_NOFILE", soft, hard)
    assert (found["verdict"], found["remedy"]) == (verdict, remedy)
    assert found["text"].startswith(f"{soft} at once")


# --- shared memory


def test_shared_memory_that_is_refused_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> SharedMemory:
        raise NotEnoughMemory("4194304 bytes of shared memory: Operation not permitted; give less memory")

    monkeypatch.setattr(memory, "SharedMemory", refuse)
    found = memory.shared_memory()
    assert (found.verdict, found.remedy) == ("problem", "give less memory")


def test_shared_memory_that_others_can_write_to_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.shared_memory().verdict == "ok"
    monkeypatch.setattr(memory, "SharedMemory", lambda *words: SharedMemory(*words, others_may_write=True))
    found = memory.shared_memory()
    assert found.verdict == "problem"
    assert "can write to it" in found.text


def test_huge_pages_are_looked_for_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = memory.huge_pages()
    assert ("2MiB" in found.text) == (found.verdict == "ok")
    monkeypatch.setattr(memory, "huge_nbytes", lambda _: 0)
    found = memory.huge_pages()
    assert found.verdict == "note"
    assert "4KiB" in found.text


def test_dev_shm_that_is_small_or_missing_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(memory, "_SMALL_SHM_NBYTES", 1 << 62)
    assert by_name(memory.shm())["/dev/shm"].verdict == "note"
    monkeypatch.setattr(memory, "_SHM", tmp_path / "none")
    found = memory.shm()
    assert by_name(found)["/dev/shm"].verdict == "note"
    assert by_name(found)["/dev/shm"].text.startswith("none")
    assert found.facts == {"shm": None}
