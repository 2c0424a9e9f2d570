"""What a model family promises, and how one is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from millstream.core import registry
from millstream.core.errors import Unsupported
from millstream.models.encoder_spec import AnySpec


class Family(Protocol):
    """Names and numbers of one family of models. Stateless."""

    name: str

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a Hugging Face style configuration is one of this family. Never raises."""
        ...

    def spec(self, config: Mapping[str, Any]) -> AnySpec:
        """The model that the configuration describes.

        Every field is either used or known to have no say in a forward pass. Raises Unsupported for any other field
        and for a value that asks for something not built here, BadFile for a value that cannot be.
        """
        ...

    def rename(self, name: str) -> str | None:
        """Our name for a checkpoint's tensor; None for one that is known and not needed.

        A name that the family does not know comes back as it is: it then matches no tensor of the spec.
        """
        ...


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a configuration. Raises Unsupported, naming the families that there are."""
    names = registry.names("family")
    for name in names:
        family: Family = registry.make("family", name)
        if family.matches(config):
            return family
    asked = config.get("model_type")
    raise Unsupported(f"there is no family for models of model_type {asked!r}; there are: {', '.join(names)}")
