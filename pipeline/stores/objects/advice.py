"""The next step after an object store's refusal."""

from __future__ import annotations

from typing import Protocol

from raymerge.pipeline.stores.abilities import ARCHIVED, ENCRYPTED, REQUESTER_PAYS
from raymerge.pipeline.stores.objects.aws import AwsAccount
from raymerge.pipeline.stores.objects.errors import NO_STORE, ObjectError

FOUND_BY = {
    "gs": "Google's tools find them (GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`)",
    "az": "Azure's tools find them (AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, `az login`)",
}


class Refused(Protocol):
    """The bucket that was asked, and how."""

    url: str
    name: str
    region: str
    aws: AwsAccount | None

    @property
    def endpoint(self) -> str:
        """The endpoint that the user has given; empty where there is none."""


def advise(error: ObjectError, bucket: Refused) -> str:
    """Return the next step after a refusal, to be appended to it; empty where none is known."""
    if bucket.aws and bucket.aws.trouble:
        return f"; {bucket.aws.trouble}"
    who = bucket.aws.describe() if bucket.aws else f"credentials as {FOUND_BY[bucket.url[:2]]}"
    if error.trouble == "TLS":
        return (
            "; the certificate is not a trusted one; if an authority of your own has signed it,"
            " name a file with that authority's certificate in AWS_CA_BUNDLE"
        )
    if error.trouble == "not TLS":
        return "; the server does not speak TLS: write http:// in the endpoint, not https://"
    is_bare = error.status in (400, 404, 405, 501) and not error.code
    if error.trouble == NO_STORE or (is_bare and bucket.endpoint):
        return "; is this the address of an object store, and is no login page or proxy on the way to it?"
    if error.trouble == "unusable name":
        return "; rename or delete it"
    if error.trouble == "name not found":
        return "; check the spelling of the endpoint" if bucket.endpoint else _check_network(bucket)
    if error.code in ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName"):
        lower = (
            f" (names of buckets are in lower case: {bucket.url.lower()}?)"
            if bucket.name != bucket.name.lower()
            else ""
        )
        return f"; there is no {bucket.url}: check its spelling{lower}, or make it first"
    if error.status in (301, 307) or error.code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        asked = bucket.aws.find_region(bucket.name) if bucket.aws else None
        region = error.region or asked or "another"
        return f"; {bucket.url} is in region {region}, and {bucket.region} was asked: set AWS_REGION"
    if error.code == "RequestTimeTooSkewed":
        ahead = error.skew
        by = f" by {abs(ahead):.0f} s, {'ahead' if ahead > 0 else 'behind'}" if ahead else ""
        return f"; the clock of this machine is wrong{by}: set it right"
    if error.code in ("ExpiredToken", "TokenRefreshRequired", "ExpiredTokenException"):
        return f" ({who}); the session has ended: log in again (`aws sso login`), or set a new AWS_SESSION_TOKEN"
    if error.code == "SignatureDoesNotMatch":
        return f" ({who}); the secret key does not belong to the access key: check both"
    if error.code in ("InvalidAccessKeyId", "InvalidToken"):
        return f" ({who}); the store does not know this access key: check it, and the endpoint"
    if error.code == "InvalidObjectState":
        return f"; {ARCHIVED}"
    if error.status in (401, 403):
        if bucket.aws and bucket.aws.is_anonymous:
            return f" ({who}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        reads = error.method in ("GET", "HEAD", "list")
        setting = (REQUESTER_PAYS if reads else ENCRYPTED) if bucket.aws else ""
        may = "read" if reads else "write"
        return f" ({who}); these may not {may} there: use others, or have them allowed to{setting}"
    return ""


def _check_network(bucket: Refused) -> str:
    return f"; check the network, and the region {bucket.region!r}" if bucket.region else "; check the network"
