"""What users get wrong with stores: each is refused with one message that says what, where and what to do next.

And names and files that look wrong, and are not.
"""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from raymerge import merge
from raymerge.pipeline.stores import retry
from raymerge.pipeline.stores.retry import Fault, FaultLog, Patience
from tests.checkpoints import INDEX, read_files, write_config, write_family
from tests.commands import Cli
from tests.servers import free_ports
from tests.servers.faults import WRITES, FaultProxy
from tests.servers.hub import HubServer
from tests.servers.hub_http import Handler
from tests.servers.hub_http import Listener as Server
from tests.servers.s3 import Keys, S3Server
from tests.stored_models import download, make_config, upload, without_own
from tests.watchers import stop_after

SHARD_SIZE = "60kB"
SHARD = "model-00001-of-00002.safetensors"
PAGE = b"<html><body>Welcome to the hotel. Please log in.</body></html>"
NOBODY = Keys("AKNOBODY000000000001", "nobodys-secret-00000000000000000000000001")
TYPOS = {
    "s3:/bucket": "did you mean s3://bucket?",
    "s3//bucket": "did you mean s3://bucket?",
    "s3:bucket/x": "did you mean s3://bucket/x?",
    "s3://": "nothing is named after s3://",
    "s3:///key": "did you mean s3://key?",
    "s3://my bucket/x": "' ' is in no name of a bucket",
    "s3://bucket?x=1": "'?' is in no name of a bucket",
    "hf://name": "write it as hf://org/name",
    "hf://datasets/x/y": "give a model repository",
    "http:/host": "did you mean http://host?",
    "gs:/b": "did you mean gs://b?",
    "ss3://b/x": "did you mean s3://?",
    "https://huggingface.co/org/name": "the model itself is hf://org/name",
}
ODD = "my models/ünï %41 100% #1?a=b+c&d"
ODD_FILES = {"with space.json": b"{}", "sub/ünï #1?x%41+y.txt": b"odd", "empty.txt": b""}
ODD_FILES["processor_config.json"] = json.dumps(list(ODD_FILES)).encode()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(write_family(tmp_path_factory.mktemp("family"), 2, dtype=torch.bfloat16, num_shards=2, hidden=64))


@pytest.fixture(scope="module")
def models(s3_server: S3Server, family: Sequence[Path]) -> list[str]:
    """The family in a bucket."""
    bucket = s3_server.create_bucket("models")
    return [upload(s3_server, bucket, path.name, path) for path in family]


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Counts what the S3 server is asked."""
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def hub(family: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer0000", user="me", can_write=["me"], can_read=["private"])
        hub.add_token("hf_reader0000", user="you", can_read=["private"])
        hub.create_repo("org/base")
        hub.create_repo("private/base", private=True)
        hub.create_repo("org/gated", gated=True)
        hub.create_repo("me/notes")
        hub.create_repo("me/model")
        for name in hub.repos:
            hub.upload(name, {"notes.txt": b"mine"} if name == "me/notes" else dict(read_files(family[0])))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in hub.environment(tmp_path, token=None).items():
            monkeypatch.setenv(name, value)
        yield hub


class Canned(Server):
    """Answers everything the same."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str], tls: ssl.SSLContext | None = None) -> None:
        super().__init__(_CannedHandler)
        self.reply = status, body, headers
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.server_address[1]}"
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: object, client_address: object) -> None:
        """Leave clients that do not trust us alone."""


class _CannedHandler(Handler):
    server: Canned

    def answer(self) -> None:
        self.send(*self.server.reply)


@pytest.fixture
def serve(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Canned]]:
    """Start a server with one answer, and have S3 clients ask it."""
    servers = []

    def start(
        status: int, body: bytes, headers: Mapping[str, str] | None = None, tls: ssl.SSLContext | None = None
    ) -> Canned:
        server = Canned(status, body, headers or {"Content-Type": "application/xml"}, tls)
        server.start()
        servers.append(server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        return server

    yield start
    for server in servers:
        server.stop()


def refuse(cli: Cli, command: Sequence[str | Path], *says: str, within: float = 30) -> None:
    """Run a command that cannot succeed; most take less than a second, and one that tries again takes 40 of them."""
    start = time.monotonic()
    outcome = cli(*command)
    seconds = time.monotonic() - start
    message = outcome.err.rpartition("Error: ")[2]
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert message.count("\n") == 1, message
    assert len(message) < 600
    for text in says:
        assert text in message
    for keys in (S3Server.admin, S3Server.reader, S3Server.stranger, NOBODY):
        assert keys.secret_access_key not in outcome.err
    assert seconds < within


def merging(tmp_path: Path, models: Sequence[str | Path], out: str | Path) -> list[str | Path]:
    name = f"{len(list(tmp_path.glob('*.yml')))}.yml"
    config = write_config(tmp_path / name, make_config(list(map(str, models))))
    return ["merge", config, out, "--workers", "1", "--shard-size", SHARD_SIZE]


def be(monkeypatch: pytest.MonkeyPatch, keys: Keys | None) -> None:
    """Ask S3 as somebody from now on; as nobody in particular where there are no keys."""
    names = {"AWS_ACCESS_KEY_ID": "access_key_id", "AWS_SECRET_ACCESS_KEY": "secret_access_key"}
    for name, field in names.items():
        if keys is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, getattr(keys, field))


CALLERS = [
    (NOBODY, "the store does not know this access key", "the store does not know this access key"),
    (Keys(S3Server.admin.access_key_id, "wrong"), "secret key does not belong", "secret key does not belong"),
    (S3Server.reader, "", "may not write there"),
    (S3Server.stranger, "may not read there", "may not read there"),
    (None, "no credentials were found", "no credentials were found"),
]


@pytest.mark.parametrize(
    ("keys", "as_input", "as_output"), CALLERS, ids=["key", "secret", "reader", "stranger", "anon"]
)
def test_who_may_not(
    models: list[str], family: list[Path], bucket: str, proxy: FaultProxy, s3_server: S3Server,
    keys: Keys | None, as_input: str, as_output: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    be(monkeypatch, keys)
    if as_input:
        refuse(cli, merging(tmp_path, models, tmp_path / "out"), models[0].rpartition("/")[0], as_input)
        for command in ("inspect", "verify"):
            refuse(cli, [command, models[0]], models[0].rpartition("/")[0], as_input)
        assert not (tmp_path / "out").exists()
    proxy.clear()
    refuse(cli, merging(tmp_path, family, f"s3://{bucket}/out"), f"s3://{bucket}", as_output)
    assert sum(proxy.operations[name] for name in WRITES) <= 1  # whoever may read finds out by asking for the lock
    assert s3_server.keys_of(bucket) == []
    assert s3_server.uploads_of(bucket) == []


def test_a_public_bucket_needs_no_credentials(
    models: list[str], family: list[Path], s3_server: S3Server, bucket: str, tmp_path: Path, cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    public = [upload(s3_server, s3_server.public_bucket, path.name, path) for path in family]
    be(monkeypatch, None)
    outcome = cli(*merging(tmp_path, public, tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert cli("verify", tmp_path / "out").code == 0


def test_what_is_not_there(
    models: list[str], family: list[Path], bucket: str, proxy: FaultProxy, s3_server: S3Server, tmp_path: Path, cli: Cli
) -> None:
    out = f"s3://{bucket}/out"
    files = read_files(family[1])
    for name in files.keys() - {SHARD}:
        s3_server.client().put_object(Bucket=bucket, Key=f"part/{name}", Body=files[name])
    for model, *says in (
        ("s3://modles/base", "s3://modles", "check its spelling", proxy.url),
        ("s3://Models/base", "s3://Models", "in lower case: s3://models?"),
        ("s3://models/bsae", "s3://models/bsae: nothing is there", "check the name"),
        (f"s3://{bucket}/part", f"{SHARD} missing", INDEX, "download"),
        (f"{models[0]}/config.json", f"{models[0]}/config.json: a file, not a directory"),
        (f"{models[0]}@v1", "leave `@v1` out"),
        ("s3://models//base", "two slashes in a row"),
    ):
        refuse(cli, merging(tmp_path, [models[0], model, models[2]], out), *says)
    refuse(cli, merging(tmp_path, models, "s3://modles/out"), "s3://modles", "make it first")
    refuse(cli, ["verify", "s3://modles/base"], "s3://modles", "check its spelling")
    refuse(cli, ["verify", "s3://models/bsae"], "s3://models/bsae: nothing is there")
    refuse(cli, ["verify", models[0]], f"{models[0]} has no raymerge_manifest.json", "not made by raymerge")
    refuse(cli, ["inspect", "s3://models/bsae"], "s3://models/bsae: nothing is there")
    assert not WRITES & proxy.operations.keys()


def test_damaged_models(
    models: list[str], family: list[Path], bucket: str, s3_server: S3Server, tmp_path: Path, cli: Cli
) -> None:
    files = read_files(family[1])
    index = json.loads(files[INDEX])
    climbing = {**index, "weight_map": {**index["weight_map"], "x": "../base/model.safetensors"}}
    for change, *says in (
        ({SHARD: b""}, f"{SHARD}: 0 bytes", "download"),
        ({SHARD: files[SHARD][:-100]}, "past the end", "download it again"),
        ({INDEX: json.dumps(climbing).encode()}, f"bad/{INDEX}", "'../base/model.safetensors' leaves"),
        ({INDEX: files[INDEX], "a\nb": b"x"}, r'"bad/a\nb"', "rename or delete it"),
    ):
        for name, content in {**files, **change}.items():
            s3_server.client().put_object(Bucket=bucket, Key=f"bad/{name}", Body=content)
        models = [models[0], f"s3://{bucket}/bad", models[2]]
        refuse(cli, merging(tmp_path, models, f"s3://{bucket}/out"), f"s3://{bucket}/bad", *says)
    assert all(key.startswith("bad/") for key in s3_server.keys_of(bucket))


def test_a_config_in_a_bucket(bucket: str, cli: Cli) -> None:
    refuse(cli, ["merge", f"s3://{bucket}/merge.yml", "out"], "cannot read the config", f"{bucket}/merge.yml")


@pytest.mark.parametrize("url", TYPOS)
def test_mistyped_urls(family: list[Path], bucket: str, url: str, tmp_path: Path, cli: Cli) -> None:
    for command in (
        ["inspect", url],
        ["verify", url],
        merging(tmp_path, [family[0], url], tmp_path / "out"),
        merging(tmp_path, family, url),
    ):
        refuse(cli, command, url, TYPOS[url])
    assert not (tmp_path / "out").exists()


def test_a_mistyped_directory(family: list[Path], tmp_path: Path, cli: Cli) -> None:
    typo = family[0].with_name("bsae")
    config = write_config(tmp_path / "merge.yml", make_config([str(typo), str(family[1])]))
    refuse(cli, ["plan", config], f"{typo}: no such directory; did you mean {family[0]}?")
    refuse(cli, ["verify", typo], f"{typo}: no such directory", f"did you mean {family[0]}?")
    refuse(cli, ["verify", "some-org/some-name"], "write hf://some-org/some-name")


def test_occupied_outputs(
    models: list[str], bucket: str, s3_server: S3Server, proxy: FaultProxy, tmp_path: Path, cli: Cli
) -> None:
    upload(s3_server, bucket, "model", write_family(tmp_path / "other", 0)[0])
    s3_server.client().put_object(Bucket=bucket, Key="notes/notes.txt", Body=b"mine")
    before = s3_server.keys_of(bucket)
    refuse(cli, merging(tmp_path, models, f"s3://{bucket}/model"), f"s3://{bucket}/model is not empty", "--overwrite")
    refuse(cli, merging(tmp_path, models, f"s3://{bucket}/notes"), "is not empty (notes.txt)", "another directory")
    overwriting = [*merging(tmp_path, models, f"s3://{bucket}/notes"), "--overwrite"]
    refuse(cli, overwriting, "does not look like a model", "nothing was deleted")
    for out in (models[0], f"{models[0]}/sub", "s3://models"):
        refuse(cli, merging(tmp_path, models, out), out, models[0], "choose another")
    assert s3_server.keys_of(bucket) == before
    assert not WRITES & proxy.operations.keys()


def xml(code: str, more: str = "") -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Not so.</Message>{more}</Error>".encode()


ANSWERS: dict[str, tuple[int, bytes, dict[str, str], list[str]]] = {
    "region": (
        400,
        xml("AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"),
        {},
        ["in region eu-west-3, and us-east-1 was asked", "AWS_REGION"],
    ),
    "redirect": (
        301,
        xml("PermanentRedirect", "<Endpoint>b.s3.eu-west-3.amazonaws.com</Endpoint>"),
        {"x-amz-bucket-region": "eu-west-3"},
        ["in region eu-west-3, and us-east-1 was asked", "AWS_REGION"],
    ),
    "clock": (
        403,
        xml(
            "RequestTimeTooSkewed",
            "<RequestTime>20261122T210000Z</RequestTime><ServerTime>2026-11-22T20:20:00Z</ServerTime>",
        ),
        {},
        ["clock of this machine is wrong by 2400 s, ahead", "set it right"],
    ),
    "session": (400, xml("ExpiredToken", "<Token-0>a-session</Token-0>"), {}, ["session has ended", "log in again"]),
    "page": (200, PAGE, {"Content-Type": "text/html"}, ["not the answer of an object store", "login page or proxy"]),
    "refusing page": (400, PAGE, {"Content-Type": "text/html"}, ["400", "address of an object store"]),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_of_s3(
    family: list[Path], serve: Callable[..., Canned], answer: str, tmp_path: Path, cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    status, body, headers, says = ANSWERS[answer]
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session")
    server = serve(status, body, {"Content-Type": "application/xml", **headers})
    for command in (
        merging(tmp_path, ["s3://b/a", *family[1:]], tmp_path / "out"),
        merging(tmp_path, family, "s3://b/out"),
        ["verify", "s3://b/a"],
        ["inspect", "s3://b/a"],
    ):
        refuse(cli, command, "s3://b", server.url, *says)
    assert not any(request.method in ("PUT", "POST", "DELETE") for request in server.requests)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "url", "says"),
    [
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000", "s3://b/x", "did you mean https://127.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:99999", "s3://b/x", "not of the form https://host:port"),
        ("AWS_ENDPOINT_URL", "http://no-such-host.invalid", "s3://b/x", "check the spelling of the endpoint"),
        ("AWS_PROFILE", "nope", "s3://b/x", "check AWS_PROFILE"),
        ("AWS_REGION", "eu west", "s3://b/x", "'eu west' is no region"),
        ("AWS_CA_BUNDLE", "/nonexistent", "s3://b/x", "cannot read /nonexistent"),
        ("AWS_CA_BUNDLE", "/dev/null", "s3://b/x", "no certificate (PEM) is in /dev/null"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent", "gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("AZURE_STORAGE_ACCOUNT_KEY", "!!", "az://b/x", "AZURE_STORAGE_ACCOUNT_NAME"),
        ("HF_ENDPOINT", "127.0.0.1:9000", "hf://org/name", "did you mean https://127.0.0.1:9000"),
        ("HF_ENDPOINT", "http://no-such-host.invalid", "hf://org/name", "there is no host no-such-host.invalid"),
    ],
)
def test_settings(
    family: list[Path], bucket: str, name: str, value: str, url: str, says: str, tmp_path: Path, cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_writer0000")
    monkeypatch.setenv(name, value)
    for command in (["inspect", url], ["verify", url], merging(tmp_path, family, url)):
        refuse(cli, command, says)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate that signs itself, and what a server needs to use it."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *names],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def test_tls(
    serve: Callable[..., Canned], certificate: tuple[Path, ssl.SSLContext], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, context = certificate
    monkeypatch.setattr(retry, "FIRST_SECONDS", 1.0)
    plain = serve(404, b"").url.replace("http:", "https:")
    tls = serve(404, b"", tls=context).url
    for endpoint, setting, of_s3, of_web in (
        (plain, "", "does not speak TLS: write http://", "does not speak TLS there; write http://"),
        (tls.replace("https:", "http:"), "", "write https://", "connection to 127.0.0.1 broke"),
        (tls, "", "not a trusted one", "is not trusted"),
        (tls, "AWS_CA_BUNDLE", "; is this the address of an object store", "is not trusted"),
        (tls, "SSL_CERT_FILE", "; is this the address of an object store", "nothing is there"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with monkeypatch.context() as patch:
            if setting:
                patch.setenv(setting, str(file))
            refuse(cli, ["inspect", "s3://tls/x"], "s3://tls", endpoint, of_s3)
            refuse(cli, ["inspect", f"{endpoint}/x"], endpoint, of_web)


@pytest.mark.slow
def test_nobody_listens(
    family: list[Path], bucket: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that has never answered is given up sooner than one that fails during a merge."""
    (port,) = free_ports(1)
    dead = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", dead)
    monkeypatch.setenv("HF_ENDPOINT", dead)
    for url in ("s3://deserted/a", "hf://org/name", f"{dead}/a"):
        says = [dead, "gave up after", "refuse"]
        refuse(cli, merging(tmp_path, [url, *family[1:]], tmp_path / "out"), *says, within=20)


def test_patience_with_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PATIENCE_SECONDS", 1.5)
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.2)

    faults = FaultLog()

    def num_tries(store: str) -> int:
        patience = Patience(faults, store, "GET")
        while patience.failed(Fault("connection refused")):
            pass
        return patience.num_attempts

    assert num_tries("s3://never-seen") <= 3
    Patience(faults, "s3://answered", "GET").succeeded()
    Patience(faults, "s3://refused", "GET").failed(Fault("503 SlowDown"))
    assert num_tries("s3://answered") > 3
    assert num_tries("s3://refused") > 3


def test_web_pages(family: list[Path], serve: Callable[..., Canned], tmp_path: Path, cli: Cli) -> None:
    url = f"{serve(200, PAGE, {'Content-Type': 'text/html'}).url}/a"
    for command in (
        merging(tmp_path, [url, *family[1:]], tmp_path / "out"),
        ["verify", url],
        ["inspect", url],
        ["inspect", f"{url}/model.safetensors"],
    ):
        refuse(cli, command, url, "the server answers with a page", "asks for a login")
    refuse(cli, merging(tmp_path, family, url), url, "http:// cannot be written to", "choose a directory, s3://")


def test_hub_inputs(
    hub: HubServer, family: list[Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in, out = "hf auth login", tmp_path / "out"
    for token, model, *says in (
        ("", "private/base", "no such repository", "it is private and you are not logged in", log_in),
        ("", "org/gated", "a gated repository; open", f"{hub.url}/org/gated", "accept the terms", log_in),
        ("hf_writer0000", "org/gated", "this account has no access yet", f"{hub.url}/org/gated", "accept the terms"),
        ("hf_writer0000", "org/bsae", "no such repository", "this account may not read it", "directory"),
        ("hf_writer0000", "org/base@v9", "no revision 'v9'", f"{hub.url}/org/base"),
        ("hf_unknown000", "org/base", "does not accept the token", log_in),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        where = f"hf://{model}"
        refuse(cli, merging(tmp_path, [model, *family[1:]], out), where, *says)
        refuse(cli, ["inspect", model], where, *says)
        refuse(cli, ["verify", where], where, *says)
    assert not out.exists()
    assert hub.leaked_tokens == []


def test_a_mistyped_directory_with_a_slash(
    hub: HubServer, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine/base", "models/base"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refuse(cli, ["inspect", "mine/bsae"], "If a directory was meant, mine/bsae is none either; did you mean mine/base?")
    meant = tmp_path / "models/base"  # there is no organisation of that name
    refuse(cli, ["inspect", "models/bsae"], "models/bsae: no such directory", f"did you mean {meant}?")


def test_hub_outputs(
    hub: HubServer, family: list[Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: hub.get_head(name) for name in hub.repos}
    model = f"hf://org/base@{before['org/base']}"
    for token, out, *says in (
        ("", "hf://me/new", "only who is logged in can write", "hf auth login"),
        ("hf_unknown000", "hf://me/new", "does not accept the token", "hf auth login"),
        ("hf_reader0000", "hf://me/new", "403", "check what the token may do"),
        ("hf_reader0000", "hf://org/base@new", "403", "check what the token may do"),
        ("hf_writer0000", "hf://me/notes", "is not empty (notes.txt)", "choose another"),
        ("hf_writer0000", model, "a commit does not change", "give a branch"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        refuse(cli, merging(tmp_path, family, out), out, *says)
    for out in ("hf://me/model", "hf://me/model/sub"):
        refuse(cli, merging(tmp_path, ["me/model", *family[1:]], out), "hf://me/model", "overlap", "choose another")
    refuse(cli, ["verify", "hf://me/model"], "hf://me/model has no raymerge_manifest.json")
    assert {name: hub.get_head(name) for name in hub.repos} == before
    assert not any(method == "PUT" for method, *_ in hub.storage_requests)


@pytest.fixture(scope="module")
def odd_family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A family with a name, and files, that look as if they meant something else."""
    directory = tmp_path_factory.mktemp("odd") / ODD
    family = write_family(directory, 1, dtype=torch.bfloat16, num_shards=2, hidden=64)
    for path in family:
        for name, content in ODD_FILES.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(content)
    return list(family)


@pytest.mark.parametrize("place", ["local", "s3", pytest.param("hub", marks=pytest.mark.slow)])
def test_odd_names(
    odd_family: list[Path], place: str, bucket: str, s3_server: S3Server, hub: HubServer, tmp_path: Path, cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_writer0000")
    if place == "s3":
        inputs, out = [upload(s3_server, bucket, f"{ODD}/{p.name}", p) for p in odd_family], f"s3://{bucket}/out/{ODD}"
    elif place == "hub":
        inputs, out = [f"hf://me/{path.name}/{ODD}" for path in odd_family], f"hf://me/merged/{ODD}"
        for path in odd_family:
            hub.create_repo(f"me/{path.name}")
            hub.upload(f"me/{path.name}", {f"{ODD}/{name}": data for name, data in read_files(path).items()})
    else:
        inputs, out = list(map(str, odd_family)), str(tmp_path / ODD)
    config = make_config(inputs)
    if place != "s3":  # else the `+` would be taken to begin a LoRA adapter
        config["base_model"] = {"model": {"path": inputs[0]}}
        config["models"][0]["model"] = {"model": {"path": inputs[1]}}
    with pytest.raises(RuntimeError):
        merge(config, out, shard_size=SHARD_SIZE, on_event=stop_after(1))
    outcome = cli("merge", write_config(tmp_path / "merge.yml", config), out, "--shard-size", SHARD_SIZE)
    assert outcome.code == 0, outcome.err
    assert "finished and sound" in outcome.err
    assert cli("verify", out).out.startswith(f"{out} is sound")
    assert cli("inspect", out).code == 0
    files = download(out)
    assert {name: files[name] for name in ODD_FILES} == ODD_FILES
    plain = [shutil.copytree(path, tmp_path / "plain" / path.name) for path in odd_family]
    merge(make_config(list(map(str, plain))), tmp_path / "expected", shard_size=SHARD_SIZE)
    assert without_own(files) == without_own(read_files(tmp_path / "expected"))


def test_directory_markers(
    family: list[Path], models: list[str], bucket: str, s3_server: S3Server, tmp_path: Path, cli: Cli
) -> None:
    """Tools that show buckets as directories make empty objects with a slash at the end."""
    marked = upload(s3_server, bucket, "marked", family[1])
    for key in ("marked/", "marked/sub/", "out/"):
        s3_server.client().put_object(Bucket=bucket, Key=key, Body=b"")
    outcome = cli(*merging(tmp_path, [models[0], marked, models[2]], f"s3://{bucket}/out"))
    assert outcome.code == 0, outcome.err
    assert cli("verify", f"s3://{bucket}/out").code == 0
    assert cli(*merging(tmp_path, models, tmp_path / "plain")).code == 0
    assert without_own(download(f"s3://{bucket}/out")) == without_own(read_files(tmp_path / "plain"))
