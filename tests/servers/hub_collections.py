"""Collections of the test Hub: what huggingface_hub asks of the Hub's, answered as it expects."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.servers.hub_buckets import BucketHandler
from tests.servers.hub_http import Refusal, get_field


@dataclass
class Collection:
    """Repositories that belong together."""

    title: str
    owner: str
    slug: str
    private: bool
    description: str
    items: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return it as the Hub does."""
        items = [
            {"_id": f"{position:024x}", "id": repo_id, "type": "model", "position": position}
            for position, repo_id in enumerate(self.items)
        ]
        return {
            "slug": self.slug,
            "title": self.title,
            "description": self.description,
            "owner": {"name": self.owner, "type": "user"},
            "private": self.private,
            "theme": "orange",
            "upvotes": 0,
            "position": 0,
            "lastUpdated": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "items": items,
        }


class CollectionHandler(BucketHandler):
    """One connection to the Hub, as far as it is about collections."""

    def answer_collection(self, method: str, rest: list[str]) -> None:
        match [method, *rest]:
            case ["POST"]:
                self._make_collection()
            case ["GET", owner, slug]:
                self.send_json(self._find_collection(f"{owner}/{slug}").describe())
            case ["POST", owner, slug, "items"]:
                self._add_item(f"{owner}/{slug}")
            case _:
                raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _check_owner(self, owner: str) -> None:
        token = self.get_token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if owner not in token.can_write:
            raise Refusal(403, f"You don't have the rights to write to collections of {owner}")

    def _find_collection(self, slug: str) -> Collection:
        found, token = self.hub.collections.get(slug), self.get_token()
        if found is None or (found.private and (token is None or found.owner not in {token.user, *token.can_read})):
            raise Refusal(404, "Collection not found")
        return found

    def _make_collection(self) -> None:
        body = self.read_json()
        title, owner = get_field(body, "title", str), get_field(body, "namespace", str)
        self._check_owner(owner)
        if not 0 < len(title) < 60:
            raise Refusal(400, '"title" length must be less than 60 characters long')
        with self.hub.lock:
            known = next(
                (each for each in self.hub.collections.values() if (each.title, each.owner) == (title, owner)), None
            )
            if known is not None:
                refusal = Refusal(409, "You already have a collection of this title")
                refusal.fields["slug"] = known.slug
                raise refusal
            slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{secrets.token_hex(12)}"
            made = Collection(title, owner, slug, body.get("private") is True, str(body.get("description") or ""))
            self.hub.collections[slug] = made
        self.send_json(made.describe())

    def _add_item(self, slug: str) -> None:
        item = get_field(self.read_json(), "item", dict)
        with self.hub.lock:
            found = self._find_collection(slug)
            self._check_owner(found.owner)
            if get_field(item, "type", str) != "model":
                raise Refusal(400, "Only models are kept here")
            repo = self.find_repo(get_field(item, "id", str))
            if repo.id in found.items:
                raise Refusal(409, "Item already in the collection")
            found.items.append(repo.id)
        self.send_json(found.describe())
