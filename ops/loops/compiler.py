"""Compiles loops with numba once on a machine, and keeps their machine code for every later process.

A process that finds the code loads it with llvmlite alone: that takes a tenth of what importing numba does.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from raymerge.ops.loops.code_files import CodeFile, find_directory

Result = TypeVar("Result")

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Element = TypeVar("Element", bound=np.generic)
    Array1: TypeAlias = NDArray[Element]
    Array2: TypeAlias = NDArray[Element]
    Array3: TypeAlias = NDArray[Element]

_SCALARS = {"int": "int64", "np.float32": "float32", "np.uint32": "uint32"}
_CTYPES = {"int64": ctypes.c_int64, "float32": ctypes.c_float, "uint32": ctypes.c_uint32}
_Place = ctypes.c_char * 0
"""An array's address; made in a fifth of the time that `argument.ctypes.data` takes."""
_RUNTIME = (
    "NRT_Free",
    "NRT_MemInfo_call_dtor",
    "numba_do_raise",
    "numba_gil_ensure",
    "numba_gil_release",
    "numba_runtime_build_excinfo_struct",
    "numba_unpickle",
)
"""Functions of numba that machine code refers to, for memory and errors. Loops never call them."""
_COUNTED = ("NRT_decref", "NRT_incref")
"""Functions of numba that machine code holds itself."""


class Loop:
    """A function that is compiled when it is first called.

    Its parameters are annotated with `int`, `np.float32`, `np.uint32`, or a contiguous array of so many dimensions,
    such as `Array2[np.int64]`; it returns a number or nothing, allocates no memory and raises nothing. It may call
    functions of its own module, and of those that this imports from. Of a function with an attribute `write`, as
    `tiles.multiply_tile` has one, what that returns is compiled.
    """

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        self._kinds = [_parse(kind) for name, kind in function.__annotations__.items() if name != "return"]
        self._entry: Callable[..., float] | None = None
        self._engine: Any = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> float:
        """Run it, without the interpreter lock.

        Raises:
            Exception: whatever numba and llvmlite raise where it cannot be compiled or loaded, at the first call.
        """
        if self._entry is None and (called := _TRACED.get()) is not None:
            called.append(self)
            result: float = self._function(*arguments)
            return result
        entry = self._entry or self._load_once()
        flat: list[Any] = []
        for (dtype, num_dimensions), argument in zip(self._kinds, arguments, strict=True):
            if num_dimensions:
                assert (argument.dtype, argument.ndim) == (dtype, num_dimensions)
                assert argument.flags.c_contiguous
                is_writable = argument.flags.writeable  # bytes, and factors that are views of them, are not
                flat += [_Place.from_buffer(argument) if is_writable else argument.ctypes.data, *argument.shape]
            else:
                flat.append(argument)
        return entry(*flat)

    @property
    def name(self) -> str:
        """Module and name, as in `module:function`."""
        return f"{self._function.__module__}:{self._function.__name__}"

    @property
    def num_instructions(self) -> int:
        """Length of its own code, without that of the functions it calls."""
        return len(self._function.__code__.co_code)

    def find_file(self) -> CodeFile | None:
        """Return the file for its machine code on this processor; None where there is no directory to keep it in."""
        return _find_file(self._function)

    def compile_to(self, file: CodeFile) -> bytes:
        """Compile it, keep the machine code in a file, and return it."""
        code = self._compile()
        file.write(code)
        return code

    def _load_once(self) -> Callable[..., float]:
        with self._lock:
            self._entry = self._entry or self._load()
            return self._entry

    def _load(self) -> Callable[..., float]:
        from llvmlite import binding

        file = self.find_file()
        if file is None:
            code = self._compile()
        elif not (code := file.read()):
            with file.hold():
                code = file.read() or self.compile_to(file)
        nothing = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
        for name in _RUNTIME:
            if binding.address_of_symbol(name) is None:  # numba's own, where that is imported
                binding.add_symbol(name, nothing)
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine()
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        entry_name, _, content = code.partition(b"\0")
        engine.add_object_file(binding.ObjectFileRef.from_data(content))
        engine.finalize_object()
        parameters: list[Any] = []
        for dtype, num_dimensions in self._kinds:
            parameters += [ctypes.c_void_p, *[ctypes.c_int64] * num_dimensions] if num_dimensions else [_CTYPES[dtype]]
        self._engine = engine  # frees the code when it goes
        return ctypes.CFUNCTYPE(ctypes.c_double, *parameters)(engine.get_function_address(entry_name.decode()))

    def _compile(self) -> bytes:
        """Return the name of the entry point and, after a zero byte, the machine code.

        The entry point takes each array as its address and its lengths.
        """
        numba: Any = importlib.import_module("numba")
        function = self._function
        helpers = _share_helpers(function)
        space = {"carray": numba.carray, function.__name__: _declare(function, helpers)}
        types, names, arguments = [], [], []
        for number, (dtype, num_dimensions) in enumerate(self._kinds):
            name, kind = f"a{number}", getattr(numba.types, dtype)
            lengths = [f"{name}_{k}" for k in range(num_dimensions)]
            types += [numba.types.CPointer(kind), *[numba.types.int64] * num_dimensions] if lengths else [kind]
            names += [name, *lengths]
            arguments.append(f"carray({name}, ({', '.join(lengths)},))" if lengths else name)
        call = f"{function.__name__}({', '.join(arguments)})"
        body = f"{call}\n    return 0.0" if function.__annotations__["return"] == "None" else f"return float({call})"
        exec(f"def entry({', '.join(names)}):\n    {body}\n", space)
        compiled = numba.cfunc(numba.types.float64(*types), error_model="numpy")(space["entry"])
        entry_name: bytes = compiled.native_name.encode()
        code: bytes = compiled._library._get_compiled_object()
        strange = sorted({name.decode() for name in re.findall(rb"\b(?:NRT|numba)_\w+", code)} - {*_RUNTIME, *_COUNTED})
        if strange:
            raise RuntimeError(
                f"the loop {self.name} needs {', '.join(strange)} of numba, which is not there when its code is loaded"
                " without numba: write it so that it makes no array and no view of another shape"
            )
        return entry_name + b"\0" + code


def loop(function: Callable[..., Result]) -> Callable[..., Result]:
    """Declare the decorated function as a loop."""
    assert isinstance(function, FunctionType)
    return Loop(function)  # type: ignore[return-value]  # any number comes as a float


_TRACED: ContextVar[list[Loop] | None] = ContextVar("traced", default=None)


@contextmanager
def trace_loops() -> Iterator[list[Loop]]:
    """Have Python run the loops that this thread calls and that are not loaded yet; provide them, in order."""
    called: list[Loop] = []
    token = _TRACED.set(called)
    try:
        yield called
    finally:
        _TRACED.reset(token)


def _parse(annotation: str) -> tuple[str, int]:
    """Return dtype and number of dimensions of a parameter.

    >>> _parse("Array2[np.float32]"), _parse("int")
    (('float32', 2), ('int64', 0))
    """
    if match := re.fullmatch(r"Array(\d)\[np\.(\w+)\]", annotation):
        return match[2], int(match[1])
    return _SCALARS[annotation], 0


def _list_modules(function: FunctionType) -> list[ModuleType]:
    """Return the modules that a loop's own one has imported functions from, then that one."""
    names = {item.__module__ for item in function.__globals__.values() if isinstance(item, FunctionType)}
    helpers = sorted(names - {function.__module__, __name__})
    return [sys.modules[name] for name in [*helpers, function.__module__]]


_HELPERS: dict[tuple[Any, ...], dict[str, Any]] = {}
"""Helper functions that loops of the same modules share: each is compiled once in a process, not for every loop."""


def _share_helpers(function: FunctionType) -> dict[str, Any]:
    """Return the names of a loop's modules, with functions that numba compiles when they are first used."""
    modules = _list_modules(function)
    own = [(name, item) for module in modules for name, item in vars(module).items() if _is_own(item, module)]
    key = (*own, *_list_numbers(modules))
    if key not in _HELPERS:
        space = _HELPERS[key] = {name: item for module in modules for name, item in vars(module).items()}
        space.update({name: _declare(item, space) for name, item in own})
    return _HELPERS[key]


def _is_own(item: object, module: ModuleType) -> bool:
    return isinstance(item, FunctionType) and item.__module__ == module.__name__


def _declare(function: FunctionType, space: dict[str, Any]) -> Any:
    """Return a function that numba compiles, without the wrappers by which Python would call it."""
    numba: Any = importlib.import_module("numba")
    if hasattr(function, "write"):
        return function.write(numba)
    body = FunctionType(function.__code__, space, function.__name__)
    options: dict[str, Any] = {
        "error_model": "numpy",
        "nogil": True,
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
    }
    return numba.njit(body, **options)


def _list_numbers(modules: Sequence[ModuleType]) -> list[str]:
    """Return the numbers that modules define, with their names."""
    known = {name: value for module in modules for name, value in vars(module).items()}
    return sorted(f"{name}={value!r}" for name, value in known.items() if isinstance(value, int | float))


def _find_file(function: FunctionType) -> CodeFile | None:
    """Return the file for a loop's code on this processor; None where there is no directory to keep it in."""
    import llvmlite
    from llvmlite import binding

    files = [__file__, *(str(module.__file__) for module in _list_modules(function))]
    sources = b"".join(Path(name).read_bytes() for name in files)
    overrides = [os.environ.get(name, "") for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")]
    cpu = [platform.machine(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), *overrides]
    numbers = _list_numbers(_list_modules(function))
    key = sha256("\0".join([llvmlite.__version__, *cpu, *numbers]).encode() + sources).hexdigest()[:24]
    directory = find_directory()
    return CodeFile(directory / f"{function.__name__}-{key}") if directory else None
