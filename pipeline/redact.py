"""Takes credentials out of text that is shown or kept."""

from __future__ import annotations

import json
import re
from typing import Any

from raymerge.pipeline.decoding import parse_json

_VALUE = r"(?:[^\s&\"',;)}<>\\]|\\\\)+"
"""Stops before a lone backslash: in JSON that escapes a quote or a line's end, which must stay."""

_NO_TEXT = r"(?!(?:true|false|null)(?:[\s,\]}]|$)|[\[{](?:[\s\"'\[\]{}]|$))"
"""Values of JSON that are no secrets; masked, they would leave text that is no JSON."""

_NAMES = (
    r"X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|server-side-encryption-customer-key|Signature|sig"
    r"|SharedAccessKey|SignatureProvided|secret_?access_?key|access_?key(?:_?id)?|account_?key|api[_-]?key|client_?secret"
    r"|(?:hf|hub|auth|id|refresh|access|session|security|sas|api|xet)[_-]?token"
)
"""Names of secrets in queries, headers, JSON, XML and key=value text, also with a prefix such as `AWS_`."""

_KNOWN = (
    # scheme://user:password@host, where the password may have a slash that should have been encoded; no port
    (
        re.compile(
            r"(?P<keep>\b(?!hf://)[a-zA-Z][a-zA-Z0-9+.-]{0,20}://)"
            r"(?:[^\s/:@?#\['\"\\]{0,300}:(?!\d{1,5}(?:[/?#\s'\"\\]|$))[^\s'\"\\]{0,300}|[^\s/?#'\"\\]{1,600})@"
        ),
        r"\g<keep>***@",
    ),
    # tokens of the Hub, of Google and AWS, signed JSON, and private keys
    (
        re.compile(r"\b(?P<keep>hf_)(?:(?:jwt|oauth)_[\w.-]+|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{8,}|[A-Za-z]{30,})"),
        r"\g<keep>***",
    ),
    (re.compile(r"\b(?P<keep>ya29\.)[\w-]+"), r"\g<keep>***"),
    (re.compile(r"\b(?P<keep>eyJ)[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]*)?"), r"\g<keep>***"),
    (re.compile(r"\b(?P<keep>AKIA|ASIA)[A-Z0-9]{12,}"), r"\g<keep>***"),
    (
        re.compile(r"(?P<keep>-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----)(?:[A-Za-z0-9+/=\s]|\\[nr])+"),
        r"\g<keep>***",
    ),
)
"""Secrets known by their own look."""

_NAMED = (
    (
        re.compile(
            rf"(?P<keep>(?<![A-Za-z0-9])(?:{_NAMES})(?:\\?[\"'])?(?:\s*(?:=|%3D|:)|>)\s*(?:\\?[\"'])?){_NO_TEXT}{_VALUE}",
            re.IGNORECASE,
        ),
        r"\g<keep>***",
    ),
    (
        re.compile(
            r"(?P<keep>(?<![A-Za-z0-9])(?:password|passwd|secret|(?<!_)token)"
            rf"(?:(?:=|%3D)(?:\\?[\"'])?|\\?[\"']\s*:\s*\\?[\"'])){_VALUE}",
            re.IGNORECASE,
        ),
        r"\g<keep>***",
    ),
    (
        re.compile(
            r"(?P<keep>\b(?:Authorization|Cookie)(?:(?:\\?[\"'])?\s*[:=]|\\?[\"']\s*,)\s*(?:b?\\?[\"'])?)"
            r"(?:[^\r\n\"'\\]|\\\\)+",
            re.IGNORECASE,
        ),
        r"\g<keep>***",
    ),
    (re.compile(r"(?P<keep>\bBearer\s+)[\w.~+/=-]+", re.IGNORECASE), r"\g<keep>***"),
)
"""Secrets known by the name before them."""

_QUERY = (re.compile(rf"(?P<keep>[?&][\w-]*(?<![A-Za-z0-9])(?:{_NAMES})=){_VALUE}", re.IGNORECASE), r"\g<keep>***")
"""Secrets in the query of a URL."""

_FIELD = re.compile(
    rf"(?<![A-Za-z0-9])(?:{_NAMES}|password|passwd|secret|(?<!_)(?:token|Authorization|Cookie))\Z", re.IGNORECASE
)
"""The end of a JSON field's name that tells of a secret."""

_SPECIAL_TOKEN = re.compile(r"<[^<>]*>")
"""A word of a tokenizer, which is no secret whatever its field is called."""


def redact(text: str) -> str:
    """Return the text with credentials replaced by `***`: in (signed) URLs, headers, settings, and known tokens.

    JSON whose secrets are strings is still JSON.

    >>> redact("https://me:pw@host/a?X-Amz-Signature=12ab&part=3")
    'https://***@host/a?X-Amz-Signature=***&part=3'
    """
    # URLs first: a name in a password would end it
    for pattern, replacement in (_KNOWN[0], *_NAMED, *_KNOWN[1:]):
        text = pattern.sub(replacement, text)
    return text


def redact_texts(value: Any) -> Any:
    """Return a JSON value with each of its strings redacted by itself, as text, so that it is JSON still.

    >>> redact_texts({"use_auth_token": True, "url": "https://me:pw@host/"})
    {'use_auth_token': True, 'url': 'https://***@host/'}
    """
    if isinstance(value, dict):
        return {redact(name): redact_texts(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_texts(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact_json(text: str) -> str:
    r"""Return the text of a JSON file with credentials in its strings replaced; unchanged where there are none.

    >>> redact_json('{"use_auth_token": "hf_0123456789abcdef", "bos_token": "<s>"}')
    '{\n  "use_auth_token": "***",\n  "bos_token": "<s>"\n}\n'
    >>> redact_json('{"use_auth_token": true}')
    '{"use_auth_token": true}'
    """
    try:
        value = parse_json(text)
        safe = redact_values(value)
    except ValueError:
        return redact(text)
    # half of a pair of surrogates can only be written as it was, with an escape
    return text if safe == value else json.dumps(safe, indent=2, ensure_ascii="\\u" in text) + "\n"


def redact_values(value: Any, key: str = "") -> Any:
    """Return a JSON value with credentials in its strings replaced, by their own look or that of their key.

    Words inside a string say nothing: chat templates have variables called `token`.

    Args:
        value: any.
        key: the name of the field that has it.
    """
    if isinstance(value, dict):
        return {name: redact_values(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [redact_values(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if value and _FIELD.search(key) and not _SPECIAL_TOKEN.fullmatch(value):
        return "***"
    for pattern, replacement in (*_KNOWN, _QUERY):
        value = pattern.sub(replacement, value)
    return value
