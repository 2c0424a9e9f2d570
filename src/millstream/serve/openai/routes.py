"""All routes of this package over one service."""

from __future__ import annotations

from starlette.routing import Route

from millstream.serve.openai.chat import ChatRoutes
from millstream.serve.openai.completions import CompletionRoutes
from millstream.serve.openai.tokens import TokenRoutes
from millstream.serve.service import Service


def routes(service: Service) -> tuple[ChatRoutes, list[Route]]:
    """The chats, for other dialects, and the routes. Handlers raise errors of the tree and msgspec's."""
    chats = ChatRoutes(service)
    return chats, [
        *chats.routes(),
        *CompletionRoutes(service).routes(),
        *TokenRoutes(service, chats).routes(),
    ]
