"""Collections of the Hub: repositories that belong together, on a page of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from huggingface_hub import Collection

from raymerge.pipeline.stores.hub.api import HubApi
from raymerge.pipeline.stores.hub.path import HubPath

_MAX_TITLE_LENGTH = 59


def gather(api: HubApi, place: HubPath, repos: Sequence[str]) -> str:
    """Add model repositories to the collection that is called as one they belong to, and return its URL.

    It is made if it is not there, and private if that repository is. What it holds already stays as it is.

    Args:
        api: of the Hub.
        place: the repository that they belong to.
        repos: their names, in order.

    Raises:
        RefusalError: the Hub refuses.
        BrokenError: it is down.
    """
    owner, _, name = place.repo.partition("/")

    def find() -> Collection:
        hub = api.hub
        is_private = bool(hub.model_info(place.repo).private)
        title = name[:_MAX_TITLE_LENGTH]
        return hub.create_collection(title, namespace=owner, private=is_private, exists_ok=True)

    found = api.ask("collection", find)
    known = {item.item_id for item in found.items if item.item_type == "model"}
    for repo in repos:
        if repo not in known:
            add = partial(api.hub.add_collection_item, found.slug, repo, "model", exists_ok=True)
            api.ask("collection", add)
    return found.url
