"""Several documents in one file: which uses which, in what order, and which one is the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.document import Document
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import suggest
from raymerge.pipeline.urls import is_url


@dataclass(frozen=True, slots=True)
class Part:
    """One document."""

    config: MergeConfig
    root: Place
    """All of it."""
    mentions: Mapping[ModelRef, Place]
    """First node that names each model."""

    @property
    def line(self) -> int | None:
        """Line of its name, or else of its method."""
        return self.root.get("merge_method" if self.config.name is None else "name").line


def join_documents(parts: Sequence[Part], document: Document) -> MergeConfig:
    """Return the document that gives the output, with those that it uses as its steps.

    It is the one without a name, or else the one that no other uses.

    Args:
        parts: the documents, in the order of the file.
        document: any of them, for messages.

    Raises:
        ConfigError: two have one name, or none; a name is unknown; documents use each other in a circle; or it is not
            clear which one is the output.
    """
    names = _find_names(parts, document)
    uses = [_find_uses(part, names, document) for part in parts]
    _check_circles(parts, uses, document)
    final = _find_final(parts, uses, document)
    order: list[int] = []

    def visit(k: int) -> None:
        for used in uses[k]:
            visit(used)
        if k not in order:
            order.append(k)

    visit(final)
    notes = [f"{parts[k].config.name}: {note}" for k in order[:-1] for note in parts[k].config.notes]
    notes += parts[final].config.notes
    unused = [part for k, part in enumerate(parts) if k not in order]
    warnings = [warning for part in parts for warning in part.config.warnings]
    warnings += [
        f"{document.where(part.line, is_short=True)}{part.config.name}: no document uses it, so it is not made"
        for part in unused
    ]
    steps = tuple(parts[k].config for k in order[:-1])
    return replace(parts[final].config, steps=steps, warnings=tuple(warnings), notes=tuple(notes))


def list_steps(config: MergeConfig) -> list[MergeConfig]:
    """Return the documents that one uses, each as a config of its own with those that it uses itself."""
    found: dict[str, MergeConfig] = {}
    for step in config.steps:
        giver = step.vocabulary.source if step.vocabulary else None
        tokenizers = (giver,) if isinstance(giver, ModelRef) else ()
        names = [model.path for model in (*step.referenced_models, *tokenizers) if model.path in found]
        needed = {each.name: each for name in names for each in (*found[name].steps, found[name])}
        plain = [replace(each, steps=()) for each in needed.values()]
        found[step.name or ""] = replace(step, steps=tuple(plain), text=config.text, own=config.own)
    return list(found.values())


def _find_names(parts: Sequence[Part], document: Document) -> dict[str, int]:
    """Return the position of each document by its name."""
    names: dict[str, int] = {}
    for k, part in enumerate(parts):
        name = part.config.name
        if name is None:
            continue
        if is_url(name) or {"", ".", ".."}.intersection(name.split("/")):
            problem = f"{name!r} is to be the name of a directory; leave out what leads elsewhere"
            raise ConfigError(document.show(str(part.root.get("name").error(problem)), part.line))
        if name in names:
            first = parts[names[name]].line
            problems = [(f"a document is called {name!r}", first), ("and so is this one; rename one", part.line)]
            raise ConfigError(document.show_all(problems))
        names[name] = k
    nameless = [part.line for part in parts if part.config.name is None]
    if len(nameless) > 1:
        problems = [("a document without a name is the output", line) for line in nameless]
        raise ConfigError(
            document.show_all(problems) + "\nonly one document can be that; give the others a `name`, and use them"
        )
    return names


def _find_uses(part: Part, names: Mapping[str, int], document: Document) -> list[int]:
    """Return the positions of the documents that one uses."""
    uses = []
    giver = part.config.vocabulary.source if part.config.vocabulary else None
    tokenizers = (giver,) if isinstance(giver, ModelRef) and giver.path in names else ()
    for model in dict.fromkeys((*part.config.referenced_models, *tokenizers)):
        place = part.mentions.get(model, part.root)
        if model.path in names:
            if model.revision is not None:
                problem = f"{model.path} is a document, and has no revisions; leave {model.revision!r} out"
                raise ConfigError(document.show(str(place.error(problem)), place.line))
            if model.adapter is not None:
                problem = (
                    f"an adapter for the output of {model.path} is not supported yet; apply it to a model before, or"
                    f" merge that document by itself first: raymerge merge {model.path}.yml ./{model.path}"
                )
                raise ConfigError(document.show(str(place.error(problem)), place.line))
            uses.append(names[model.path])
        elif "/" not in model.path and not is_url(model.path) and not _is_directory(model.path):
            problem = f"{model.path[:200]!r} is no document, nor a directory here; {suggest(model.path, [*names])}"
            raise ConfigError(document.show(str(place.error(problem)), place.line))
    return uses


def _is_directory(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # such as a name that is too long for one
        return False


def _check_circles(parts: Sequence[Part], uses: Sequence[Sequence[int]], document: Document) -> None:
    done: set[int] = set()

    def visit(k: int, path: tuple[int, ...]) -> None:
        if k in path:
            circle = path[path.index(k) :]
            problems = []
            for user, used in zip(circle, (*circle[1:], circle[0]), strict=True):
                name = parts[used].config.name or ""
                place = parts[user].mentions[ModelRef(name)]
                problems.append((str(place.error(f"{parts[user].config.name} uses {name}")), place.line))
            raise ConfigError(document.show_all(problems) + "\nno document can be made of itself; break the circle")
        if k not in done:
            for used in uses[k]:
                visit(used, (*path, k))
            done.add(k)

    for k in range(len(parts)):
        visit(k, ())


def _find_final(parts: Sequence[Part], uses: Sequence[Sequence[int]], document: Document) -> int:
    nameless = [k for k, part in enumerate(parts) if part.config.name is None]
    if nameless:
        return nameless[0]
    used = {k for each in uses for k in each}
    finals = [k for k in range(len(parts)) if k not in used]
    if len(finals) > 1:
        problems = [(f"no document uses {parts[k].config.name}", parts[k].line) for k in finals]
        raise ConfigError(document.show_all(problems) + "\nonly one can be the output: the one without a name")
    return finals[0]
