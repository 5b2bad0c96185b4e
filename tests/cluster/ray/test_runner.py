from __future__ import annotations

from collections.abc import Iterator

import pytest

from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import RaySession, start_ray
from raymerge.cluster.runner import Runner
from tests.cluster.runner_contract import RunnerContract


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with start_ray(5) as session:
        yield session


class TestRay(RunnerContract):
    @pytest.fixture(autouse=True)
    def _session(self, session: RaySession) -> None:
        pass

    def make_runner(self, num_workers: int) -> Runner:
        return RayRunner(num_workers)
