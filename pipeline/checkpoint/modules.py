"""The modules of a checkpoint, told by its tensors' names: language model, vision tower, projector, encoder ..."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from raymerge.pipeline.checkpoint.names import OTHER_SENSES, Layers, split_name

TEXT, VISION, AUDIO, PROJECTOR = "text", "vision", "audio", "projector"
ENCODER, DECODER, SHARED = "encoder", "decoder", "shared"

ROLES = {
    "text_decoder": (TEXT, DECODER),
    **dict.fromkeys(("language_model", "text_model"), (TEXT,)),
    **dict.fromkeys(("vision_tower", "vision_model", "visual", "vision_encoder"), (VISION,)),
    **dict.fromkeys(("audio_tower", "audio_model", "audio_encoder"), (AUDIO,)),
    **dict.fromkeys(("multi_modal_projector", "mm_projector", "projector", "connector", "merger"), (PROJECTOR,)),
    "encoder": (ENCODER,),
    "decoder": (DECODER,),
    "shared": (SHARED,),
}
"""Names for modules of any checkpoint, mergekit's among them, and the roles that these stand for."""

_SHOWN = {TEXT: "text_decoder", VISION: "vision_tower", AUDIO: "audio_tower", PROJECTOR: "multi_modal_projector"}
"""Names of roles in messages, as in mergekit."""
_PROJECTOR = re.compile(
    r"projector|projection|connector|merger|resampler|qformer|perceiver|aligner|abstractor|embed_vision|embed_audio"
)
_AUDIO = re.compile(r"audio|speech")
_HEADS = ("lm_head", "embed_out", "proj_out", "final_logits_bias")
"""Tensors and modules that turn the last hidden states into logits, and may lie beside the language model."""
_MAX_DEPTH = 64
"""Layers that lie deeper are nobody's: names of thousands of words take minutes, and more calls than there may be."""


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model with all of its tensors."""

    path: str
    """Prefix of its tensors' names, without the last dot; empty for the whole model."""
    role: str
    """Its role in the model; empty where its name does not tell."""
    prefixes: tuple[str, ...]
    """All beginnings of names that it holds: a tensor has one as its name, or as the modules that it lies in."""
    without: tuple[str, ...] = ()
    """Beginnings of names that it does not hold after all."""

    @property
    def name(self) -> str:
        """The last word of its path."""
        return self.path.rpartition(".")[2]

    def match(self, name: str) -> int:
        """Return how much of a tensor's name says that it lies in this module, from 1; 0 where it does not."""
        if any(_begins(name, prefix) for prefix in self.without):
            return 0
        return max((len(prefix) + 1 for prefix in self.prefixes if _begins(name, prefix)), default=0)


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of one checkpoint; each of its tensors lies in one of them."""

    found: tuple[Module, ...]
    """The one with the main stack of layers comes first."""
    names: Collection[str]
    """All of its tensors."""

    @property
    def is_one(self) -> bool:
        """Whether there is but one, which is the whole model."""
        return len(self.found) == 1

    def choose(self, name: str) -> Module | None:
        """Return the module that is called by a name: its path, the last word of that, or a role's name.

        `visual` of Qwen-VL holds the projector as well, `vision_tower` does not.
        """
        path = name.removesuffix(".")
        alike = [each for each in self.found if path in (each.path, each.name)]
        alike = [each for each in alike if each.path == path] or alike
        if not alike:
            alike = [self._leave_projector(each) for each in self._find_role(ROLES.get(path, ()))]
        if not alike:
            inner = sorted({found for each in self.names if (found := _find_inner(each, path))})
            alike = [Module(each, "", (each,)) for each in inner]
        return alike[0] if len(alike) == 1 else None

    def describe(self) -> str:
        """Return what the modules are called, each with mergekit's name where that is another."""
        texts = []
        for each in (*self.found, *self._list_projectors()):
            known = _SHOWN.get(each.role, each.name)
            texts.append(each.path + (f" ({known})" if each.name != known else ""))
        return ", ".join(texts)

    def list_names(self) -> list[str]:
        """Return every name that `choose` understands but for modules inside of modules."""
        roles = {each.role for each in (*self.found, *self._list_projectors())}
        known = [name for name, of in ROLES.items() if roles.intersection(of)]
        return list(dict.fromkeys([*(each.path for each in self.found), *(each.name for each in self.found), *known]))

    def _find_role(self, roles: Sequence[str]) -> list[Module]:
        found = [each for each in self.found if each.role in roles]
        return found or (self._list_projectors() if PROJECTOR in roles else [])

    def _list_projectors(self) -> list[Module]:
        """Return the projector that lies inside of the vision tower, if there is one."""
        towers = [each for each in self.found if each.role == VISION]
        inner = [(each, prefixes) for each in towers if (prefixes := self._find_projector(each))]
        return [Module(prefixes[0], PROJECTOR, prefixes) for _, prefixes in inner]

    def _leave_projector(self, module: Module) -> Module:
        if module.role != VISION:
            return module
        return Module(module.path, VISION, module.prefixes, (*module.without, *self._find_projector(module)))

    def _find_projector(self, module: Module) -> tuple[str, ...]:
        """Return the beginnings of a projector's names inside of a module."""
        inside = [name for name in self.names if module.match(name)]
        start = common_prefix(inside)
        words = dict.fromkeys(_first_word(name, start) for name in inside)
        return tuple(start + word for word in words if _PROJECTOR.search(word))


def find_modules(names: Collection[str], layers: Layers) -> Modules:
    """Return the modules of a checkpoint.

    One has the main stack of layers, and reaches as far around that as nothing of another kind is met; heads belong to
    it, or to `shared` where an encoder and a decoder share an embedding of that name. Everything else is cut where it
    has parted from that one.

    Args:
        names: of all tensors.
        layers: of the same tensors.
    """
    whole = Module("", TEXT, ("",))
    if not layers.main or layers.main.count(".") > _MAX_DEPTH:
        return Modules((whole,), names)
    inside = _parent(layers.main)
    foreign = [inside + word for word in _list_words(names, inside) if _is_foreign(word)]
    path = inside
    while path and not foreign and not _has_others(names, layers, _parent(path), path):
        path = _parent(path)
    if not path and not foreign:
        return Modules((whole,), names)
    around = [path[: match.end()] for match in re.finditer(r"\.", path)][:-1]
    if any(start.removesuffix(".") in names for start in around):
        return Modules((whole,), names)  # no module is a tensor as well: the names are not those of a model
    heads = tuple(start + head for start in ("", *around) for head in _HEADS)
    heads = tuple(head for head in heads if not path.startswith(f"{head}."))
    main = Module(path.removesuffix("."), TEXT, (path.removesuffix("."), *heads), tuple(foreign))
    if not path:
        main = Module("", TEXT, tuple(word for word in _list_words(names, "") if word not in foreign), ())
    others = [_make_other(path) for path in _cut(names, main, "")]
    return Modules(tuple(_settle_encoder(main, others)), names)


def common_prefix(names: Iterable[str]) -> str:
    """Return what all names begin with, up to a dot.

    >>> common_prefix(["visual.blocks.0.w", "visual.patch.w"]), common_prefix(["visual.w"]), common_prefix(["w", "a.w"])
    ('visual.', 'visual.', '')
    """
    parts: list[str] | None = None
    for name in names:
        words = name.split(".")[:-1]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(words if parts is None else parts, words, strict=False))
        parts = [word for word, _ in alike]
    return "".join(f"{part}." for part in parts or ())


def _settle_encoder(main: Module, others: Sequence[Module]) -> Iterator[Module]:
    """Yield the modules, with what an encoder and a decoder share in a module of its own, if there is one."""
    around = main.path.rpartition(".")[0]
    beside = {each.name: each for each in others if each.path.rpartition(".")[0] == around}
    encoder, shared = beside.get(ENCODER), beside.get(SHARED)
    if encoder is None:
        yield main
        yield from others
        return
    heads = main.prefixes[1:]
    copies = tuple(f"{each.path}.embed_tokens" for each in (encoder, main))
    if shared is None:
        heads, copies = (), ()
    yield Module(main.path, DECODER, tuple(p for p in main.prefixes if p not in heads), (*main.without, *copies))
    for each in others:
        if each is encoder:
            yield Module(each.path, ENCODER, each.prefixes, copies)
        elif each is shared:
            yield Module(each.path, SHARED, (*each.prefixes, *heads, *copies))
        elif each.path not in heads:
            yield each


def _make_other(path: str) -> Module:
    word = path.rpartition(".")[2]
    role = ""
    if _PROJECTOR.search(word):
        role = PROJECTOR
    elif _AUDIO.search(word):
        role = AUDIO
    elif OTHER_SENSES.search(word):
        role = VISION
    return Module(path, role, (path,))


def _cut(names: Collection[str], main: Module, start: str) -> Iterator[str]:
    """Yield the paths of modules that have nothing of the main one, each as short as can be."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(start):
            groups.setdefault(_first_word(name, start), []).append(name)
    for word, inside in groups.items():
        is_main = [bool(main.match(name)) for name in inside]
        if not any(is_main):
            yield start + word
        elif not all(is_main):
            yield from _cut(inside, main, f"{start}{word}.")


def _has_others(names: Collection[str], layers: Layers, start: str, path: str) -> bool:
    """Tell whether below `start` there is something of another kind than what is below `path`."""
    beside = [name for name in names if name.startswith(start) and not name.startswith(path)]
    if any(_is_foreign(_first_word(name, start)) for name in beside):
        return True
    splits = (split for name in beside if (split := split_name(name)) is not None)
    return any(split.stack in layers.stacks and "." in split.rest for split in splits)


def _is_foreign(word: str) -> bool:
    return OTHER_SENSES.search(word) is not None or _PROJECTOR.search(word) is not None


def _find_inner(name: str, path: str) -> str:
    """Return the beginning of a tensor's name up to the words of a path, outside of any layer; empty if it has none."""
    split = split_name(name)
    modules = (name if split is None else split.stack).rpartition(".")[0]
    found = re.search(rf"(?:^|\.){re.escape(path)}(?=\.|$)", modules)
    return modules[: found.end()] if found and path else ""


def _list_words(names: Collection[str], start: str) -> list[str]:
    return list(dict.fromkeys(_first_word(name, start) for name in names if name.startswith(start)))


def _first_word(name: str, start: str) -> str:
    return name[len(start) :].partition(".")[0]


def _parent(path: str) -> str:
    """Return a path that ends with a dot without its last word.

    >>> _parent("model.layers."), _parent("layers.")
    ('model.', '')
    """
    return re.sub(r"[^.]+\.$", "", path)


def _begins(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")
