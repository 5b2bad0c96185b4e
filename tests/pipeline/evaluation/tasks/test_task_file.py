from __future__ import annotations

from pathlib import Path

import pytest

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.tasks.answers import Check, Extraction, Markers
from raymerge.pipeline.evaluation.tasks.task_file import TaskFile, read_task_file

ITEMS = "items:\n  - {prompt: a, answer: 1}\n"


def read(tmp_path: Path, text: str, **others: str) -> TaskFile:
    for name, content in others.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    path = tmp_path / "task.yml"
    path.write_text(text)
    return read_task_file(path)


def test_a_task_with_everything(tmp_path: Path) -> None:
    task = read(
        tmp_path,
        """
        name: sums
        system: Be short.
        prompt: "Q: {question}\\n{choices}\\nA {not a field}:"
        answer: right
        items: rows.jsonl
        shots: [{question: "0?", right: A, choices: [x, y]}]
        extract: {regex: "is ([A-Z])"}
        check: choice
        thinking: ["[", "]"]
        template: {enable_thinking: true}
        samples: 8
        temperature: 0.6
        top_p: 0.95
        top_k: 20
        max_new_tokens: 99
        seed: 7
        stop: "\\n\\n"
        """,
        rows='{"id": "q", "question": "1?", "choices": ["no", "yes"], "right": "yes"}\n\n',
    )
    assert task.name == "sums"
    [item] = task.items
    assert item.name == "q"
    assert item.expected == "B"
    assert item.messages == (
        ("system", "Be short."),
        ("user", "Q: 0?\nA. x\nB. y\nA {not a field}:"),
        ("assistant", "A"),
        ("user", "Q: 1?\nA. no\nB. yes\nA {not a field}:"),
    )
    assert (task.extraction, task.check) == (Extraction("regex", "is ([A-Z])"), Check("choice"))
    assert task.markers == Markers("[", "]")
    assert task.template == {"enable_thinking": True}
    assert (task.sampling.samples, task.sampling.top_k, task.sampling.stop) == (8, 20, ("\n\n",))


def test_what_is_not_said_follows_from_the_answers(tmp_path: Path) -> None:
    numbers = read(tmp_path, ITEMS)
    assert (numbers.extraction, numbers.check) == (Extraction("number"), Check("numeric"))
    assert numbers.name == "task"
    words = read(tmp_path, "items: [{prompt: a, answer: Paris}]")
    assert (words.extraction, words.check) == (Extraction("text"), Check("exact"))


def test_a_file_of_json_lines_is_a_task(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1+1", "answer": 2}\n{"prompt": "1+2", "answer": "3"}\n')
    task = read_task_file(path)
    assert task.name == "sums"
    assert [item.expected for item in task.items] == [2, "3"]


def test_the_digest_is_of_what_decides_a_score(tmp_path: Path) -> None:
    first = read(tmp_path, ITEMS)
    assert read(tmp_path, f"samples: 4\nname: other\n{ITEMS}").digest == first.digest
    for other in (f"extract: text\n{ITEMS}", f"tolerance: 0.1\n{ITEMS}", ITEMS.replace("prompt: a", "prompt: b")):
        assert read(tmp_path, other).digest != first.digest


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("items: [{prompt: a}]", r"task.yml:1: items\[0\]: no answer: 'answer' is missing"),
        ("items: [{prompt: a, anwser: 1}]", "did you mean 'anwser'"),
        ("items: [{question: a, answer: 1}]", "'prompt' is missing"),
        ("items: []", "there are no items"),
        ("prompt: x", "items: missing"),
        ("itmes: []", "itmes: unknown key; did you mean 'items'"),
        (f"sampels: 4\n{ITEMS}", "task.yml:1: sampels: unknown key; did you mean 'samples'"),
        (f"limit: 4\n{ITEMS}", "limit: unknown key; give the option --limit in its place"),
        (f"extract: {{regex: 'a(b'}}\n{ITEMS}", r"no regular expression .*: missing \): a\(b\n"),
        (f"extract: {{regex: '(?=a)'}}\n{ITEMS}", "no look-around"),
        (f"extract: numbr\n{ITEMS}", "did you mean 'number'"),
        (f"check: numerc\n{ITEMS}", "did you mean 'numeric'"),
        ("check: numeric\nitems: [{prompt: a, answer: b}]", '"b" is no number'),
        ("check: regex\nitems: [{prompt: a, answer: '('}]", "no regular expression"),
        ("items: [{prompt: a, answer: d, choices: [x, y]}]", "none of the choices: x, y"),
        ("items: [{prompt: a, answer: {x: 1}}]", "neither text nor a number"),
        ("items: [{prompt: a, answer: yes}]", "put yes, no, true and false in quotes"),
        ("items: [{id: 1, prompt: a, answer: b}, {id: 1, prompt: b, answer: b}]", "'1' is there already"),
        (f"temperature: hot\n{ITEMS}", '"hot" is given, a number from 0 to 100'),
        (f"samples: 0\n{ITEMS}", "0 is given, a whole number from 1"),
        (f"top_p: 1.5\n{ITEMS}", "1.5 is given"),
        (f"stop: [1]\n{ITEMS}", "a string or a list of strings"),
        (f"thinking: '<think>'\n{ITEMS}", r"write \[<think>, </think>\]"),
        ("items: rows.jsonl", "rows.jsonl cannot be read"),
        ("task: gsm8k\ndoc_to_text: x", "a task of lm-eval; give --task lm-eval:gsm8k --include-path"),
        ("merge_method: slerp", "a merge config"),
        ("- a", "a mapping"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read(tmp_path, "samples: no\nextract: x\nitems: [{prompt: a}]")
    assert str(told.value).count("task.yml:") == 3


def test_mistakes_are_told_with_items_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        read(tmp_path, "items: summs.jsonl\nmax_new_tokens: lots\ntemperature: -1\nsampels: 2\n", sums="{}")
    lines = [line for line in str(told.value).splitlines() if "task.yml:" in line]
    assert [line.split(": ")[1] for line in lines] == ["items", "max_new_tokens", "temperature", "sampels"]
    assert "No such file or directory; did you mean " in lines[0]
    assert lines[0].endswith("sums.jsonl?")
    assert "warning" not in str(told.value)


def test_a_mistake_of_many_items_is_told_once(tmp_path: Path) -> None:
    rows = '{"prompt": "1+1", "answer": 2}\n' * 5000
    with pytest.raises(ConfigError) as told:
        read(tmp_path, "items: sums.jsonl\nprompt: '{promt}'", sums=rows)
    said = str(told.value)
    assert "sums.jsonl:1: 'promt' is missing, and so in 4,999 other items; did you mean 'prompt'?" in said
    assert said.count("promt") == 1


def test_mistakes_of_a_file_of_json_lines_alone_are_told(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1+1", "answer": 2}\n{"prompt": "1+2"}\n')
    with pytest.raises(ConfigError, match=r"sums\.jsonl:2: no answer: 'answer' is missing"):
        read_task_file(path)


def test_a_bad_regular_expression_writes_nothing_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for text in (f"extract: {{regex: 'a(b'}}\n{ITEMS}", "check: regex\nitems: [{prompt: a, answer: 'c(d'}]"):
        with pytest.raises(ConfigError):
            read(tmp_path, text)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", "{\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", "[1]\n", "an object is needed"),
        ("a.jsonl", "\n", "has no items"),
        ("a.csv", "a,b\n", "a task is a .yml file"),
    ],
)
def test_other_files(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        read_task_file(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "sums.yml").write_text("")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*sums\.yml\?"):
        read_task_file(tmp_path / "sum.yml")
