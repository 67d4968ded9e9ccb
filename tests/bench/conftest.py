"""Memory cgroups, where they can be made."""

import pytest

from sparseflow.bench import memory_cgroup
from sparseflow.bench.memory_cgroup import GroupParent


@pytest.fixture
def group_parent() -> GroupParent:
    try:
        return memory_cgroup.find_group_parent()
    except memory_cgroup.NoMemoryGroupError as error:
        pytest.skip(str(error))
