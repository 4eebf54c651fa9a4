"""The base models this server has, by name or alias, as the engine reports them."""

from __future__ import annotations

from collections.abc import Sequence

from tuft.engine.base import Engine
from tuft.errors import InvalidInput, ModelError
from tuft.types import BaseModelInfo


class BaseModels:
    """Empty until the engine can compute for the first time; one that starts again has the same."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: Sequence[BaseModelInfo] = ()

    @property
    def all(self) -> Sequence[BaseModelInfo]:
        self._known = self._engine.base_models or self._known
        return self._known

    def require(self, name: str, field: str = "base_model") -> BaseModelInfo:
        """The model of that name or alias. What follows a colon, as in ``Qwen/Qwen3-8B:peft:262144``, chooses among
        variants that a larger service has of one model: here there is one of each, so it counts only if a name of ours
        has it. Raises InvalidInput that lists what there is, ModelError if not ready."""
        if not self.all:
            raise ModelError("the base model is still loading; try again in a few seconds")
        for wanted in (name, name.partition(":")[0]):
            for model in self.all:
                if wanted == model.name or wanted in model.aliases:
                    return model
        names = ", ".join(repr(model.name) for model in self.all)
        raise InvalidInput(field, name, f"this server has {names}")
