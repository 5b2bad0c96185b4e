"""The donor's files that an output gets besides weights: those that a model is made of, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint, check_links
from raymerge.pipeline.checkpoint.files import CONFIG, check_name, is_rewritten, is_secret, is_side_file, is_weights
from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import counted, escaped
from raymerge.pipeline.redact import redact_json
from raymerge.pipeline.sizes import format_nbytes
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import is_url

_MODULES = "modules.json"
_MAX_TEXT_NBYTES = 64 * 2**20
"""Tokenizers of many added words have configs of some MiB."""
_REFERRING = re.compile(r"(?:.*/)?(?:[\w.-]*config[\w.-]*|modules|preprocessor|processor)\.json|.*\.py")
"""Files that may name other files of a model."""

_ASIDE = re.compile(
    r"(?:onnx|openvino|gguf|coreml|tflite|original|runs|checkpoint-\d+|b?f(?:p|loat)?\d+|u?int\d+|awq|gptq|mlx)(?:/|$)",
    re.IGNORECASE,
)
"""Directories of exports, other precisions and training, whatever words there are in configs."""

_REFERENCE = re.compile(r"(?:.*_)?(?<!name_or_)(?:path|dir|directory|folder|structure)s?")
"""Fields of configs that name directories of the model: of modules, and as a Router of sentence-transformers does."""
_IMPORT = re.compile(r"^\s*from\s+\.(\w*)\s+import\s+(\w+)", re.MULTILINE)
_STRING = re.compile(r"""["']([^"'\n]+)["']""")
_WITH_WEIGHTS = ("Dense", "LayerNorm", "CNN", "LSTM", "WordEmbeddings", "StaticEmbedding", "WeightedLayerPooling")
"""Modules of sentence-transformers that are nothing without a file of weights."""


@dataclass(frozen=True, slots=True)
class SideFiles:
    """The donor's files besides its weights."""

    copied: tuple[tuple[str, StoredFile], ...]
    """Relative name, file."""
    masked: tuple[tuple[str, str], ...]
    """Files that hold a token: relative name, and the text without it."""
    missing: tuple[str, ...]
    """Files of code that configs name and that are not there."""
    module_weights: tuple[str, ...]
    """Copied files that are weights: those of modules in directories of their own."""
    left_out: tuple[str, ...]
    """Everything that is in the directory besides."""
    read_nbytes: tuple[int, ...]
    """Sizes of the files that were read to find out."""


def find_side_files(stores: Stores, checkpoint: Checkpoint) -> SideFiles:
    """Find the files of a model that an output gets: those that models are made of, and those that its configs name.

    Of a pipeline, these are the files of each component, and those beside model_index.json.

    Raises:
        CheckpointError: a module's weights are missing, a name cannot be written everywhere, or a file is a link out of
            the directory.
        FetchError: the store refuses or is down.
    """
    if not checkpoint.components:
        return _find_of_directory(stores, checkpoint)
    listed = tuple(part.prefix for part in checkpoint.components)
    outside = {name: file for name, file in checkpoint.files.items() if not name.startswith(listed)}
    top = replace(checkpoint, weight_files=(), files=outside, components=())
    found = [(part.prefix, _find_of_directory(stores, part)) for part in (top, *checkpoint.components)]
    code = checkpoint.files.keys() & _find_pipeline_code(checkpoint.config)
    copied = {prefix + name: file for prefix, beside in found for name, file in beside.copied}
    copied |= {name: checkpoint.files[name] for name in sorted(code)}
    return SideFiles(
        copied=tuple(sorted(copied.items())),
        masked=tuple((prefix + name, text) for prefix, beside in found for name, text in beside.masked),
        missing=tuple(prefix + name for prefix, beside in found for name in beside.missing),
        module_weights=tuple(prefix + name for prefix, beside in found for name in beside.module_weights),
        left_out=tuple(
            name for prefix, beside in found for name in map(prefix.__add__, beside.left_out) if name not in code
        ),
        read_nbytes=tuple(nbytes for _, beside in found for nbytes in beside.read_nbytes),
    )


def _find_pipeline_code(content: Mapping[str, Any]) -> set[str]:
    """Return the files of code that a model_index.json names, should the modules there be none of a library.

    >>> sorted(_find_pipeline_code({"_class_name": ["pipeline", "Mine"], "unet": ["my_unet", "MyUNet"]}))
    ['pipeline.py', 'unet/my_unet.py']
    """
    names = set()
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], str):
            names.add(f"{value[0]}.py" if key == "_class_name" else f"{key}/{value[0]}.py")
    return names


def _find_of_directory(stores: Stores, checkpoint: Checkpoint) -> SideFiles:
    """Find those of a model, or of one component."""
    files = checkpoint.files
    weights = {file.url.removeprefix(f"{checkpoint.url}/") for file in checkpoint.weight_files}
    found = {name for name in files if is_side_file(name)}
    candidates = {name for name in files if _may_be_named(name) and name not in found | weights}
    masked, sizes, missing = {}, [], set()
    todo = [*([CONFIG] if CONFIG in files else []), *sorted(found)]  # an adapter has none
    while todo:
        name = todo.pop(0)
        is_code = name.endswith(".py")
        if not _REFERRING.fullmatch(name) or (is_code and not candidates):
            continue
        if name != CONFIG and files[name].nbytes > _MAX_TEXT_NBYTES:
            raise CheckpointError(
                f"{files[name].url}: {format_nbytes(files[name].nbytes)} are too many to look for credentials in, which"
                " no output may get; make the file smaller, or take it away"
            )
        if name == CONFIG:
            text = json.dumps(checkpoint.config)
        else:
            text = stores.at(files[name].url).read(files[name].url, _MAX_TEXT_NBYTES).decode(errors="replace")
            sizes.append(files[name].nbytes)
            if not is_code and (safe := redact_json(text)) != text:
                masked[name] = safe
        if name.endswith("config.json"):
            missing |= _find_code(name, text) - files.keys()
        if name == _MODULES:
            _check_modules(stores, checkpoint, text)
        named = _find_named(name, text, candidates)
        found |= named
        candidates -= named
        todo += sorted(named)
    _check_names(checkpoint, found)
    return SideFiles(
        copied=tuple((name, files[name]) for name in sorted(found) if name not in masked),
        masked=tuple(masked.items()),
        missing=tuple(sorted(missing)),
        module_weights=tuple(name for name in sorted(found) if is_weights(name)),
        left_out=tuple(name for name in files if name not in found | weights and not is_rewritten(name)),
        read_nbytes=tuple(sizes),
    )


def explain_left_out(checkpoint: Checkpoint, names: Collection[str], *, is_donor: bool) -> Iterator[str]:
    """Yield a line for each kind of files that stay behind, with the files.

    Args:
        checkpoint: that has them.
        names: of files that get into no output.
        is_donor: whether its other files would be copied; if not, only weights are told.
    """
    weights = [name for name in names if is_weights(name)]
    secrets = [name for name in names if is_secret(name)]
    others = [name for name in names if name not in {*weights, *secrets}]
    kinds = [(weights, "weights that are not part of the checkpoint, neither merged nor copied")]
    if is_donor:
        kinds += [(secrets, "looks like a secret, never copied"), (others, "not part of a model, not copied")]
    for listed, what in kinds:
        if listed:
            yield f"{checkpoint.model}: {what}: {', '.join(_group(checkpoint.files, listed))}"


def _group(files: Mapping[str, StoredFile], names: Collection[str]) -> list[str]:
    """Return names with sizes, those of a directory together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        top, slash, _ = name.partition("/")
        top = escaped(top)
        groups.setdefault(top + slash, []).append(name)
    result = []
    for group, members in groups.items():
        number = f"{counted(len(members), 'file')}, " if group.endswith("/") else ""
        result.append(f"{group} ({number}{format_nbytes(sum(files[name].nbytes for name in members))})")
    return result


def _may_be_named(name: str) -> bool:
    """Tell whether a file belongs to a model if another one names it."""
    if is_secret(name) or is_rewritten(name) or _ASIDE.match(name) or name.endswith((".lock", ".incomplete")):
        return False
    return "/" in name or not is_weights(name)


def _find_named(name: str, text: str, candidates: Collection[str]) -> set[str]:
    """Return the files that a file of the model names: by itself, by a directory, or as code that it imports."""
    if not candidates:
        return set()
    where = PurePosixPath(name).parent
    if name.endswith(".py"):
        modules = {one or other for one, other in _IMPORT.findall(text)}
        strings = set(_STRING.findall(text))
        quoted = {other for other in candidates if PurePosixPath(other).name in strings}
        return quoted | {str(where / f"{module}.py") for module in modules}.intersection(candidates)
    try:
        value = parse_json(text)
        words, directories = set(_list_words(value)), set(_list_directories(value))
    except ValueError:
        return set()
    paths = {(where / word).as_posix() for word in words} | words
    directories = {path.as_posix() for word in directories for path in (where / word, PurePosixPath(word))}
    code = {(where / f"{word.rpartition('--')[2].partition('.')[0]}.py").as_posix() for word in words if "." in word}
    found = {other for other in candidates if other in paths or other in code}
    for other in candidates:
        is_inside = any(parent.as_posix() in directories for parent in PurePosixPath(other).parents)
        if is_inside and _is_of_module(other, candidates):
            found.add(other)
    return found


def _find_code(name: str, text: str) -> set[str]:
    """Return the files of code that a config's `auto_map` names, but for those in other repositories."""
    config = None
    with suppress(ValueError):
        config = parse_json(text)
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    words = _list_words(list(auto_map.values())) if isinstance(auto_map, dict) else ()
    here = [word.partition(".")[0] for word in words if "." in word and "--" not in word]
    return {(PurePosixPath(name).parent / f"{module}.py").as_posix() for module in here}


def _list_words(value: Any) -> Iterator[str]:
    """Yield the strings of a JSON value that may be names, keys too."""
    if isinstance(value, str):
        if 0 < len(value) < 256 and value != ".":
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _list_words(key)
            yield from _list_words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _list_words(item)


def _list_directories(value: Any) -> Iterator[str]:
    """Yield the strings of a JSON value that name directories: any other word may do so by accident."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _list_words(item) if _REFERENCE.fullmatch(key) else _list_directories(item)
    elif isinstance(value, list):
        for item in value:
            yield from _list_directories(item)


def _is_of_module(name: str, candidates: Collection[str]) -> bool:
    """Tell whether a file in a module's directory is part of it; pickled weights are where there are no others."""
    path = PurePosixPath(name)
    if name.endswith((".safetensors", ".safetensors.index.json")):
        return True
    if path.name == "pytorch_model.bin":
        return (path.parent / "model.safetensors").as_posix() not in candidates
    return path.name == CONFIG or is_side_file(path.name)


def _check_modules(stores: Stores, checkpoint: Checkpoint, text: str) -> None:
    """Refuse a model whose list of modules names one that has weights, and whose weights are not there."""
    try:
        modules = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.url}/{_MODULES}: not JSON: {error}") from error
    for module in modules if isinstance(modules, list) else ():
        path, kind = (str(module.get(key) or "") for key in ("path", "type")) if isinstance(module, dict) else ("", "")
        kind, path = kind.rpartition(".")[2], PurePosixPath(path).as_posix() if path else ""
        has_weights = any(name.startswith(f"{path}/") and is_weights(name) for name in checkpoint.files)
        if path and kind in _WITH_WEIGHTS and not has_weights:
            advice = stores.at(checkpoint.url).advise_download(checkpoint.url)
            raise CheckpointError(
                f"{checkpoint.url}: {_MODULES} names {path} ({kind}), whose weights are missing; {advice}"
            )


def _check_names(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Refuse files that cannot be written as they are to every store, and links that lead out of a model."""
    for name in sorted(names):
        check_name(name, checkpoint.url)
    directories = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    if both := directories.intersection(names):
        raise CheckpointError(
            f"{checkpoint.url}: {min(both)} is both a file and a directory, which no file system can hold; rename one"
        )
    if not is_url(checkpoint.url):
        check_links(Path(checkpoint.root), [checkpoint.prefix + name for name in names])
