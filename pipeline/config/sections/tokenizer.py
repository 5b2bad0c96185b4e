"""`tokenizer` and `tokenizer_source`: which tokens the output has, and where their rows come from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.reference import ParseModel
from raymerge.pipeline.messages import shown

_MAX_MULTIPLE = 2**20

Where = Callable[[Place], str]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that a token gets in models without it: zeros, or a model's."""

    model: ModelRef | None
    """Whose row it is; None for zeros."""
    token: str | None = None
    """The token in that model; None where `token_id` says it, or for the same token."""
    token_id: int | None = None
    """Its row in that model."""
    path: str = field(default="", compare=False)
    """Its place in the YAML, with file and line, for messages."""


@dataclass(frozen=True, slots=True)
class TokenRule:
    """One entry of `tokens`."""

    row: TokenRow | None
    """None where the models decide, as for any other token."""
    force: bool
    """Whether models that have the token get this row, too."""


@dataclass(frozen=True, slots=True)
class VocabularyRule:
    """The tokenizer that the output gets."""

    source: str | ModelRef
    """`union`, `base`, or a model."""
    path: str = field(compare=False)
    """Its place in the YAML, with file and line, for messages."""
    tokens: tuple[tuple[str, TokenRule], ...] = ()
    """Tokens with rows of their own, in the order of the file; those that are missing are added."""
    multiple: int = 1
    """The number of rows is rounded up to a multiple of this."""


def parse_tokenizer(root: Place, parse_model: ParseModel, where: Where) -> VocabularyRule | None:
    """Return what a config says of the output's tokenizer; None where it says nothing.

    Args:
        root: the whole config.
        parse_model: reads the name of a model.
        where: returns what messages call a place.

    Raises:
        PlaceError: it says it twice, or something that cannot be.
    """
    old, new = root.get("tokenizer_source"), root.get("tokenizer")
    if old.value is not None and new.value is not None:
        raise old.error("`tokenizer` is given, too, and only one can be; write `tokenizer: {source: ...}` alone")
    if old.value is not None:
        return VocabularyRule(_parse_source(old, parse_model), where(old))
    if new.value is None:
        return None
    new.check_keys(("source", "tokens", "pad_to_multiple_of"))
    source, tokens = new.get("source"), new.get("tokens")
    rules = tuple(
        (_check_token(tokens, token), _parse_rule(tokens.get(token), parse_model, where)) for token in tokens.names()
    )
    named = "union" if source.value is None else _parse_source(source, parse_model)
    multiple = _parse_multiple(new.get("pad_to_multiple_of"))
    return VocabularyRule(named, where(new if source.value is None else source), rules, multiple)


def check_rows(rule: VocabularyRule, models: Collection[ModelRef], root: Place) -> None:
    """Refuse rows of models that the config does not merge."""
    for token, entry in rule.tokens:
        if entry.row is not None and entry.row.model is not None and entry.row.model not in models:
            place = root.get("tokenizer").get("tokens").get(token)
            place.note(
                place.error(
                    f"{entry.row.model} is none of the models that are merged ({', '.join(map(str, models))}), so it"
                    " gives no rows; add it to them, perhaps with weight 0"
                )
            )


def _parse_source(place: Place, parse_model: ParseModel) -> str | ModelRef:
    if place.value in ("union", "base"):
        return str(place.value)
    if isinstance(place.value, str):  # mergekit's first versions wrote a model as `model:org/name`
        place = replace(place, value=place.value.removeprefix("model:"))
    return parse_model(place)


def _check_token(tokens: Place, token: str) -> str:
    if not token:
        raise tokens.error("a token is empty; write the word that it stands for")
    return token


def _parse_rule(place: Place, parse_model: ParseModel, where: Where) -> TokenRule:
    if place.value is None:
        return TokenRule(None, force=False)
    place.check_keys(("source", "force"))
    source, force = place.get("source"), place.get("force").value
    if force is not None and type(force) is not bool:
        raise place.get("force").error(f"{shown(force)} is given; write true or false")
    return TokenRule(None if source.value is None else _parse_row(source, parse_model, where), force is True)


def _parse_row(place: Place, parse_model: ParseModel, where: Where) -> TokenRow:
    if not isinstance(place.value, dict) or "kind" not in place.value:
        return TokenRow(parse_model(place), path=where(place))
    kind = place.get("kind")
    match kind.value:
        case "zero":
            place.check_keys(("kind",))
            return TokenRow(None, path=where(place))
        case "model_token":
            place.check_keys(("kind", "model", "token", "token_id"))
            model, token, number = (place.get(key) for key in ("model", "token", "token_id"))
            if (token.value is None) == (number.value is None):
                raise place.error("give one of `token` and `token_id`, to say which row of the model it is")
            if number.value is not None and (type(number.value) is not int or number.value < 0):
                raise number.error(f"{shown(number.value)} is given; write the number of a row, from 0")
            text = None if token.value is None else token.text()
            return TokenRow(parse_model(model), text, number.value, where(place))
    raise kind.error(f"{shown(kind.value)} is given; write `zero`, or `model_token` with a model and its token")


def _parse_multiple(place: Place) -> int:
    if place.value is None:
        return 1
    if type(place.value) is not int or not 0 < place.value <= _MAX_MULTIPLE:
        raise place.error(f"{shown(place.value)} is given; write a whole number from 1, such as 64")
    return place.value
