"""No credential stays in a text, and the rest of it does."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.errors import ConfigError, FetchError
from raymerge.pipeline.redact import redact, redact_json, redact_values
from tests.commands import Cli

SECRET = "S3cr3tS3cr3tS3cr3t"

TEXTS = {
    "userinfo": ("GET https://me:{}@host/a failed", "GET https://***@host/a failed"),
    "token as user": ("https://{}@host/a", "https://***@host/a"),
    "password alone": ("redis://:{}@host", "redis://***@host"),
    "password with @": ("https://me:a@{}@host/a", "https://***@host/a"),
    "AWS secret with a slash": ("s3://AKID:ab/{}+/c@bucket/key", "s3://***@bucket/key"),
    "signed by AWS": (
        "https://h/k?X-Amz-Credential={0}%2F20260101%2Fus-east-1&X-Amz-Security-Token={0}&X-Amz-Signature={0}&part=1",
        "https://h/k?X-Amz-Credential=***&X-Amz-Security-Token=***&X-Amz-Signature=***&part=1",
    ),
    "signed by Google": ("https://h/k?X-Goog-Signature={}&a=1", "https://h/k?X-Goog-Signature=***&a=1"),
    "signed by CloudFront": ("https://h/k?Expires=9&Signature={}~&a=1", "https://h/k?Expires=9&Signature=***&a=1"),
    "signed by Azure": ("https://h/k?sv=2024&sig={}%3D&se=9", "https://h/k?sv=2024&sig=***&se=9"),
    "signed, encoded": ("url=https%3A%2F%2Fh%3FX-Amz-Signature%3D{}", "url=https%3A%2F%2Fh%3FX-Amz-Signature%3D***"),
    "header": ("> Authorization: Bearer {}\n> Host: h", "> Authorization: ***\n> Host: h"),
    "header of AWS": ("Authorization: AWS4-HMAC-SHA256 Credential={0}, Signature={0}", "Authorization: ***"),
    "headers as a dict": (
        "{{'authorization': 'Bearer {}', 'host': 'h'}}",
        "{{'authorization': '***', 'host': 'h'}}",
    ),
    "headers as bytes": ("(b'Authorization', b'Basic {}='), (b'a', b'b')", "(b'Authorization', b'***'), (b'a', b'b')"),
    "cookie": ("Cookie: token={0}; session={0}", "Cookie: ***"),
    "bearer": ("sent Bearer {} to h", "sent Bearer *** to h"),
    "session token header": ("x-amz-security-token: {}", "x-amz-security-token: ***"),
    "SSE-C": ("x-amz-server-side-encryption-customer-key: {}=", "x-amz-server-side-encryption-customer-key: ***"),
    "environment": ("AWS_SECRET_ACCESS_KEY={} AWS_REGION=x", "AWS_SECRET_ACCESS_KEY=*** AWS_REGION=x"),
    "environment, Hub": ("HUGGING_FACE_HUB_TOKEN={0} HF_TOKEN={0}", "HUGGING_FACE_HUB_TOKEN=*** HF_TOKEN=***"),
    "credentials file": ("aws_secret_access_key = {}\n[other]", "aws_secret_access_key = ***\n[other]"),
    "STS as JSON": ('{{"SecretAccessKey": "{0}", "Expires": 1}}', '{{"SecretAccessKey": "***", "Expires": 1}}'),
    "STS as XML": ("<SessionToken>{}</SessionToken>", "<SessionToken>***</SessionToken>"),
    "Azure connection string": ("AccountName=a;AccountKey={}==;Suffix=b", "AccountName=a;AccountKey=***;Suffix=b"),
    "keywords": ("S3FileSystem(key='k', secret='{}')", "S3FileSystem(key='k', secret='***')"),
    "JSON settings": ('{{"password": "{0}", "token": "{0}"}}', '{{"password": "***", "token": "***"}}'),
    "Hub token": ("Invalid user token hf_{}.", "Invalid user token hf_***."),
    "Hub token of letters": ("hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "hf_***"),
    "Hub token, OAuth": ("hf_oauth_{}.x-y", "hf_***"),
    "signed JSON": ("got eyJhbGciOiJIUzI1.eyJzdWIiOiIx.{}_- here", "got eyJ*** here"),
    "Google token": ("ya29.{}-_x", "ya29.***"),
    "AWS temporary key": ("ASIAABCDEFGHIJKLMNOP", "ASIA***"),
    "private key": (
        '"private_key": "-----BEGIN PRIVATE KEY-----\\n{}/+\\nabc=\\n-----END PRIVATE KEY-----\\n"',
        '"private_key": "-----BEGIN PRIVATE KEY-----***-----END PRIVATE KEY-----\\n"',
    ),
}  # fmt: skip
"""By what it is: a text with a place for a secret, and what is left."""


@pytest.mark.parametrize("what", TEXTS)
def test_a_secret_is_taken_out(what: str) -> None:
    template, expected = TEXTS[what]
    found = redact(template.format(SECRET))
    assert SECRET not in found
    assert "***" in found
    assert found == expected.format()
    assert redact(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s3://bucket/models/a: 403 Forbidden; check your keys",
        "hf://org/name@main", "hf://gpt2@refs/pr/1", "org/name@main", "hf://org/name@5f3a",
        "http://127.0.0.1:8333/org/name@rev", "http://localhost:80 and me@host", "http://[::1]:8333/a@b",
        "see https://host/path, or write to me@host.org",
        "https://host/a?part=1&versionId=3",
        "model.layers.0.self_attn.q_proj.weight",
        "pip install hf_transfer hf_xet hf_sentencetransformers; hf_hub_download, hf_quant_config.json",
        "num_tokens=5, pad_token=<s>, {'bos_token': '<s>'}, max_new_tokens: 3",
        "SignatureDoesNotMatch; the signature is wrong",
        "a token is missing: set HF_TOKEN",
        "design=1&assign: 2",
        '{"use_auth_token": true, "api_key": null, "access_token": {"a": 1}, "id_token": [ ], "hf_token":{}}',
    ],
)  # fmt: skip
def test_the_rest_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "value",
    [
        {"chat_template": "{% set token=message.content %}{{ 'Authorization: Bearer ' + tok }}{{ password='x' }}"},
        {"chat_template": [{"name": "default", "template": "{% set api_key: hf_token = 'a' %}"}]},
        {"token": "<|tool|>", "pad_token": "x", "secret": "", "password": None, "api_key": 1},
        {"Authorization": ["<s>"], "f": "org/name@main"},
    ],
)  # fmt: skip
def test_templates_in_configs_stay(value: object) -> None:
    assert redact_values(value) == value
    text = json.dumps(value)
    assert redact_json(text) == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"Authorization": f"é {SECRET}"}, {"Authorization": "***"}),
        ({"password": f"'{SECRET}"}, {"password": "***"}),
        ({"my_api_key": [f'"{SECRET}']}, {"my_api_key": ["***"]}),
        ({"token": f"\\{SECRET}"}, {"token": "***"}),
        ({"a": f"x hf_{SECRET}"}, {"a": "x hf_***"}),
        ({"a": f"https://me:{SECRET}@h/x"}, {"a": "https://***@h/x"}),
        ({"a": f"https://h/x?b=1&X-Amz-Signature={SECRET}&c=2"}, {"a": "https://h/x?b=1&X-Amz-Signature=***&c=2"}),
    ],
)
def test_secrets_in_configs_go(value: object, expected: object) -> None:
    assert redact_values(value) == expected
    assert json.loads(redact_json(json.dumps(value))) == expected


def test_json_that_is_hard_to_write_again() -> None:
    half = f'{{"hf_token": "hf_{SECRET}", "a": "\\ud800", "b": "é"}}'
    safe = redact_json(half)
    assert json.loads(safe.encode()) == {"hf_token": "***", "a": "\ud800", "b": "é"}
    nested = f'{{"hf_token": "hf_{SECRET}", "use_auth_token": true, "a": {"[" * 300}{"]" * 300}}}'
    assert json.loads(redact_json(nested))["hf_token"].endswith("***")


FRAGMENTS = st.sampled_from(
    [
        'https://h/a?sig=abc', '"', "\\", "\n", "'", " ", "token=", "Authorization: Bearer x", "https://", "u:p@h", "@",
        "password=a\\b", '"secret": "x', "<SessionToken>", "-----BEGIN PRIVATE KEY-----\nab\n", "\x00", "é", ":", "/",
    ]
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=12))
def test_json_stays_json(parts: list[str]) -> None:
    """What is redacted as a text, and is JSON, can still be read afterwards."""
    value = {"config": "".join(parts), "list": parts}
    found = json.loads(redact(json.dumps(value, indent=1, ensure_ascii=False)))
    assert found.keys() == value.keys()
    assert len(found["list"]) == len(parts)


@given(FRAGMENTS, st.lists(FRAGMENTS, max_size=12).map("".join))
def test_any_config_can_be_redacted(key: str, text: str) -> None:
    assert redact_values({key: text, "Authorization": text}).keys() == {key, "Authorization"}


@given(st.lists(FRAGMENTS, max_size=12).map("".join))
def test_twice_is_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("part", ["a-", "a://", "a://b:", "a://b@", "token=", '"', "hf_", "eyJ", "X-Amz-", "Bearer "])
def test_long_texts_take_no_time(part: str) -> None:
    text = part * (400_000 // len(part))
    start = time.process_time()
    redact(text)
    assert time.process_time() - start < 20


def test_errors_are_redacted(cli: Cli) -> None:
    assert SECRET not in str(ConfigError(f"https://me:{SECRET}@host: no"))
    error = FetchError(f"https://h/?X-Amz-Signature={SECRET}: gone")
    assert SECRET not in f"{error!r} {error} {error.args}"
    outcome = cli("inspect", f"s3://AKID:a/{SECRET}@bucket/model")
    assert outcome.code == 2
    assert SECRET not in outcome.err + outcome.out
    assert "credentials do not belong in a URL" in outcome.err
