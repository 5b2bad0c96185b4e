from __future__ import annotations

import resource
from pathlib import Path

import pytest

from raymerge.pipeline.evaluation.samples import Sample, open_log, parse_samples
from raymerge.pipeline.stores.open import Stores

FIRST = Sample("a", 0, 1.0, 12, True, False, {"loss": 0.5}, {"text": "line\nline \u2028 \ud83d"})
SECOND = Sample("b", 3, None)


def test_samples_are_read_without_their_details(tmp_path: Path, stores: Stores) -> None:
    url = str(tmp_path / "model" / "task.jsonl")
    with open_log(stores, url) as log:
        log.add(FIRST)
        log.add(SECOND)
        log.add(FIRST)
    with open_log(stores, url) as log:
        assert log.samples.keys() == {("a", 0), ("b", 3)}
        assert log.samples["a", 0].measures == {"loss": 0.5}
        assert log.samples["a", 0].detail == {}
    assert Path(url).read_bytes() == FIRST.dump() + SECOND.dump()


@pytest.mark.parametrize("num", range(1, len(SECOND.dump())))
def test_a_torn_last_line_is_dropped(tmp_path: Path, stores: Stores, num: int) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(FIRST.dump() + SECOND.dump()[:num])
    with open_log(stores, str(path)) as log:
        assert log.samples.keys() == {FIRST.key}
        log.add(SECOND)
    assert path.read_bytes() == FIRST.dump() + SECOND.dump()


def test_a_damaged_line_is_no_sample() -> None:
    lines = [b'{"item": 5}\n', b"\0\0\0\n", b"[]\n", FIRST.dump()]
    assert [sample.key for sample in parse_samples(b"".join(lines))] == [FIRST.key]


def test_a_store_that_cannot_append_has_all_lines_at_the_end(stores: Stores) -> None:
    url = "memory://samples/task.jsonl"
    for sample in (FIRST, SECOND):
        with open_log(stores, url) as log:
            log.add(sample)
    assert stores.at(url).read(url, 2**20) == FIRST.dump() + SECOND.dump()


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, stores: Stores) -> None:
    path = tmp_path / "task.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log(stores, str(path)) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            with pytest.raises(OSError, match=r"task\.jsonl"):
                log.add(FIRST)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not log.samples
