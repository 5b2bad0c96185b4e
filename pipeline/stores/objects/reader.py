"""Ranged GETs of S3 objects, straight into the caller's memory: obstore's bodies cost two copies and fresh memory."""

from __future__ import annotations

from datetime import timedelta

import obstore

from raymerge.pipeline.stores.files import StoredFile, check_same
from raymerge.pipeline.stores.objects.aws import AwsAccount
from raymerge.pipeline.stores.objects.bucket import Bucket
from raymerge.pipeline.stores.objects.errors import ObjectError, refusal, translated
from raymerge.pipeline.stores.objects.writer import quoted, unquoted
from raymerge.pipeline.stores.web.client import Answer, WebClient
from raymerge.pipeline.stores.web.errors import BrokenError
from raymerge.pipeline.stores.web.reader import check_range

_SIGNED_FOR = timedelta(hours=1)
_ABOUT_THE_OBJECT = (404, 412, 416)


class DirectReader:
    """Reads by signed URLs, each made for one request.

    Where that is refused or cannot be done, as some proxies and policies of buckets have it, obstore is to ask: it has
    the last word, and its errors are those that are explained.
    """

    def __init__(self, aws: AwsAccount) -> None:
        self._client = WebClient(aws.read_ca_bundle())
        self._refused = {""} if aws.is_anonymous else set[str]()
        """Buckets that are not read from in this way; with an empty name among them, none is."""

    def open_range(self, bucket: Bucket, key: str, file: StoredFile, start: int, stop: int) -> Answer | None:
        """Make one request for bytes [start, stop) of an object and return the answer; None where obstore is to ask.

        Raises:
            FetchError: the object has changed, or the store cannot serve parts of it.
            ObjectError: the store is overloaded.
            BrokenError: no whole answer came.
        """
        if not self._refused.isdisjoint(("", bucket.name)):
            return None
        headers = {"Range": f"bytes={start}-{stop - 1}"} | ({"If-Match": quoted(file.etag)} if file.etag else {})
        try:
            with translated("GET"):
                url = obstore.sign(bucket.reads, "GET", key, _SIGNED_FOR)
            answer = self._client.open("GET", url, headers)
        except (BrokenError, ObjectError) as error:
            if isinstance(error, BrokenError) and error.fault:
                raise
            self._refused.add(bucket.name)
            return None
        try:
            etag = answer.headers.get("ETag")
            if answer.status == 206 and etag:
                check_range(answer, file, start, stop)
                check_same(file, file.nbytes, unquoted(etag))
                return answer
            refused = refusal("GET", answer.status, answer.read() if answer.status >= 400 else b"")
            if refused.as_fault():
                raise refused
        except BaseException:
            answer.close()
            raise
        answer.close()
        if answer.status not in _ABOUT_THE_OBJECT:
            self._refused.add(bucket.name)
        return None

    def close(self) -> None:
        """Close connections."""
        self._client.close()
