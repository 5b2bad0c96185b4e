from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raymerge.pipeline.decoding import is_decodable
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import EvaluationError
from raymerge.pipeline.evaluation.evaluators.loss import Losses
from raymerge.pipeline.evaluation.generation.transformers_worker import Loaded, Server
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.samples import Sample
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

TEXT = f"{TEXTS[1]} – ünder 😀 the brown box. " * 9
WINDOW = 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenized(tmp_path_factory.mktemp("model") / "model", 3, byte_level(TEXTS[0]))


def measure(directory: Path, batch_size: int = 4, **changes: object) -> list[Sample]:
    request = {
        "kind": "loss",
        "model": str(directory),
        "digest": "",
        "dtype": "auto",
        "texts": {"a.txt": TEXT, "b.txt": TEXTS[0]},
        "window": WINDOW,
        "limit": None,
        "finished": [],
        "batch_size": batch_size,
        **changes,
    }
    answers = Server().serve(request)
    return [Sample(each["item"], each["number"], None, measures=each["measures"]) for each in answers]


def prepare(tmp_path: Path, text: str | bytes, **options: int) -> object:
    path = tmp_path / "held_out.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Losses().prepare(str(path), EvaluateOptions(**options))  # type: ignore[arg-type]


def test_it_is_transformers_own_on_the_same_windows(directory: Path) -> None:
    loaded = Loaded(str(directory), "", "auto")
    found = {sample.key: sample.measures for sample in measure(directory)}
    num = 0
    for name, text in (("a.txt", TEXT), ("b.txt", TEXTS[0])):
        ids = loaded.tokenizer.encode(text)
        for number, start in enumerate(range(0, len(ids) - 1, WINDOW - 1)):
            window = torch.tensor([ids[start : start + WINDOW]])
            with torch.no_grad():
                expected = loaded.model(input_ids=window, labels=window).loss.item()
            measures = found[name, number]
            assert measures["tokens"] == window.shape[1] - 1
            assert measures["nats"] / measures["tokens"] == pytest.approx(expected, rel=1e-6)
            num += 1
        own = [measures for key, measures in found.items() if key[0] == name]
        first = loaded.tokenizer.decode(ids[:1])
        assert sum(each["tokens"] for each in own) == len(ids) - 1
        assert sum(each["bytes"] for each in own) == len(text.encode()) - len(first.encode())
    assert len(found) == num


def test_neither_the_batch_nor_what_is_finished_changes_it(directory: Path) -> None:
    whole = measure(directory)
    for batch_size in (1, 100):
        for one, other in zip(whole, measure(directory, batch_size), strict=True):
            assert one.key == other.key
            assert one.measures["nats"] == pytest.approx(other.measures["nats"], rel=1e-6)
    finished = [list(sample.key) for sample in whole[1:]]
    assert [sample.key for sample in measure(directory, finished=finished)] == [whole[0].key]
    assert [sample.key for sample in measure(directory, limit=1)] == [("a.txt", 0), ("b.txt", 0)]


def test_figures_are_per_token_and_per_byte(directory: Path, tmp_path: Path) -> None:
    task = Losses().prepare(str(write_text(tmp_path)), EvaluateOptions())
    samples = measure(directory)
    found = task.summarise(samples)
    nats, tokens, nbytes = (sum(sample.measures[name] for sample in samples) for name in ("nats", "tokens", "bytes"))
    assert found.loss
    assert found.loss.mean == pytest.approx(nats / tokens)
    assert found.loss.low < found.loss.mean < found.loss.high
    assert found.other["bits_per_byte"] == pytest.approx(nats / math.log(2) / nbytes)


def test_a_text_of_too_few_tokens_says_whose_they_are(tmp_path: Path) -> None:
    task = Losses().prepare(str(write_text(tmp_path)), EvaluateOptions())
    with pytest.raises(EvaluationError, match=f"of the {len(TEXT):,} characters of loss:held_out.txt.* lacks its"):
        task.summarise([])


def write_text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text(TEXT)
    return path


def test_a_pattern_names_several_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    task = Losses().prepare(f"{tmp_path}/*.txt", EvaluateOptions(limit=3))
    assert task.name == "loss:*.txt"
    assert task.sampling["limit"] == 3


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [("a.txt", b"", "it is empty"), ("a.txt", b"\xff\xfe\x00", "not UTF-8"), ("b.txt", b"", "No such file")],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        Losses().prepare(str(tmp_path / name), EvaluateOptions())
    with pytest.raises(ConfigError, match="no file matches"):
        Losses().prepare(str(tmp_path / "*.text"), EvaluateOptions())
    with pytest.raises(ConfigError, match="nothing is sampled"):
        Losses().prepare(str(tmp_path / name), EvaluateOptions(samples=2))


@pytest.mark.parametrize(("samples", "problem"), [([], "nothing to predict"), ([math.nan], "not finite")])
def test_no_loss(tmp_path: Path, samples: list[float], problem: str) -> None:
    task = Losses().prepare(str(write_text(tmp_path)), EvaluateOptions())
    with pytest.raises(EvaluationError, match=problem):
        task.summarise([Sample("a", 0, None, measures={"nats": nats, "tokens": 3}) for nats in samples])


def test_a_loss_beyond_all_reason_is_read_again(tmp_path: Path) -> None:
    task = Losses().prepare(str(write_text(tmp_path)), EvaluateOptions())
    found = task.summarise([Sample("a", 0, None, measures={"nats": 3e3, "tokens": 3})])
    assert is_decodable(found.other["perplexity"])
    assert found.loss
    assert found.loss.mean == 1000


def test_a_text_that_is_not_there_has_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match=r"nothere\.txt: No such file or directory; did you mean .*/there\.txt\?"):
        Losses().prepare(str(tmp_path / "nothere.txt"), EvaluateOptions())
