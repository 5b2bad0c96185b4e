"""Files of ops that users give, and installed packages that declare some."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from raymerge.ops.errors import OpFileError
from raymerge.ops.own import OwnOps, read_own_ops
from raymerge.ops.registry import find_op, load_ops

HALVED = '''
from raymerge.ops.kernels.linear import LinearCombination
from raymerge.ops.registry import Base, PerModel, merge_op

@merge_op(title="Halved", base=Base.INPUT)
def halved(weight: PerModel[float] = (1.0,)):
    """Half of it."""
    return Halved((0.5,))

class Halved(LinearCombination):
    pass
'''


def test_declares_what_the_file_does() -> None:
    own = OwnOps("halved.py", HALVED)
    assert list(own.ops) == ["halved"]
    op = find_op("halved", own.ops)
    assert (op.title, op.summary, op.origin) == ("Halved", "Half of it.", f"sha256:{own.identity}")
    assert "halved" not in load_ops()


def test_files_of_the_same_names_do_not_meet() -> None:
    quartered = OwnOps("halved.py", HALVED.replace("0.5", "0.25"))
    ops = [own.ops["halved"] for own in (OwnOps("halved.py", HALVED), quartered)]
    kernels = [op.kernel({"weight": (1.0,)}) for op in ops]
    assert [kernel.coefficients for kernel in kernels] == [(0.5,), (0.25,)]  # type: ignore[attr-defined]
    assert type(kernels[0]) is not type(kernels[1])


def test_a_process_without_the_file_unpickles_what_comes_after_it() -> None:
    own = OwnOps("halved.py", HALVED)
    data = pickle.dumps((own, own.ops["halved"].kernel({"weight": (1.0,)})))
    code = "import pickle, sys; own, kernel = pickle.load(sys.stdin.buffer); print(kernel.coefficients, *own.ops)"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["(0.5,)", "halved"]


def test_identity_follows_from_the_content() -> None:
    own = OwnOps("halved.py", HALVED)
    assert own.identity == replace(own, path="elsewhere.py").identity
    assert own.identity != replace(own, source=f"{HALVED}\n").identity


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "mine.py declares no op; put @merge_op before the function that is one"),
        ("x = 1\n\ny = x / 0\n", "mine.py:3: ZeroDivisionError: division by zero"),
        ("def f(:\n", "mine.py:1: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)\n", "mine.py:1: SystemExit: 0"),
        (HALVED * 2, "mine.py:16: TypeError: halved is declared twice; rename one"),
        (HALVED.replace("weight: PerModel[float]", "weight"), "mine.py:5: TypeError: parameter 'weight' of"),
        (HALVED.replace("PerModel[float] = (1.0,)", "list = ()"), "mine.py:5: TypeError: parameter 'weight' is"),
        ("import nowhere_at_all\n", "mine.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        (
            HALVED.replace("def halved", "def linear"),
            "mine.py declares linear, and there is a method of that name; rename",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_told(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(source)
    for _ in range(2):  # it is not taken for loaded afterwards
        with pytest.raises(OpFileError) as caught:
            read_own_ops("mine.py")
        assert str(caught.value).startswith(message)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OpFileError, match=r"cannot read the ops in .*none\.py: No such file or directory"):
        read_own_ops(tmp_path / "none.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    with pytest.raises(OpFileError, match="it is no UTF-8 text"):
        read_own_ops(tmp_path / "binary.py")


LIST = "from raymerge.ops.registry import load_ops; print([op.origin for op in load_ops().values() if op.origin])"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (HALVED, "['my-methods 1.2']"),
        ("import nowhere_at_all", "my-methods 1.2: its ops (my_methods) cannot be loaded: ModuleNotFoundError"),
        (HALVED.replace("def halved", "def ties"), "my-methods 1.2 declares ties, and there is one of that name"),
    ],
)
def test_installed_packages_add_ops(source: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "my_methods.py").write_text(source)
    about = tmp_path / "my_methods-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[raymerge.ops]\nhalved = my_methods\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {LIST}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert expected in done.stdout + done.stderr


def test_threads_that_read_one_file_find_all_of_it() -> None:
    source = f"import time\ntime.sleep(0.2)\n{HALVED}"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: list(OwnOps("slow.py", source).ops), range(4)))
    assert found == [["halved"]] * 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("return None", "halved returns None; it must return a Kernel, such as Elementwise"),
        ("return 1 / 0", "mine.py:8: halved: ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_fails_is_named_with_its_line(line: str, message: str) -> None:
    op = OwnOps("mine.py", HALVED.replace("return Halved((0.5,))", line)).ops["halved"]
    with pytest.raises(OpFileError) as caught:
        op.kernel({"weight": (1.0,)})
    assert str(caught.value).startswith(message)


def test_names_that_python_keeps_for_itself_end_in_an_underscore() -> None:
    source = HALVED.replace("weight: PerModel[float] = (1.0,)", "max_: float = 1.0")
    op = OwnOps("mine.py", source).ops["halved"]
    assert [parameter.name for parameter in op.parameters] == ["max"]
    op.kernel({"max": 2.0})
