"""The adapters of an engine process, by their ids. They are this process's own: they end with it.

Whatever is asked for is on its device when it is given out, and stays there until the next turn begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuft.engine.base import CopyAdapter, CreateAdapter, DropAdapter, ExportAdapter, LoadAdapter, RunLoss
from tuft.engine.loaded import LoadedModel
from tuft.engine.paging import Pager
from tuft.errors import EngineDied, EngineError, InvalidInput
from tuft.footprint import check_adapter, gradient_bytes
from tuft.models.lora import Adapter
from tuft.types import AdapterState

AdapterCommand = CreateAdapter | LoadAdapter | CopyAdapter | ExportAdapter | DropAdapter


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    adapter: Adapter
    model: LoadedModel


class Adapters:
    """Adapters of all base models, which are known by their names and aliases. ``max_bytes`` bounds what
    they hold on their device (``Pager``); None is no bound."""

    def __init__(self, models: Sequence[LoadedModel], max_bytes: int | None = None) -> None:
        self.models = models
        self._pager = None if max_bytes is None else Pager(models[0].decoder.device, max_bytes)
        self._of_turn: set[Adapter] = set()
        self._models = {name: model for model in models for name in (model.info.name, *model.info.aliases)}
        self._adapters: dict[str, LoadedAdapter] = {}

    def begin_turn(self) -> None:
        """What was given out before may leave its device, but for what samples are decoded with."""
        self._of_turn.clear()

    def execute(self, command: AdapterCommand) -> AdapterState | None:
        """Make, change or give out an adapter. Raises TuftError."""
        match command:
            case CreateAdapter(adapter_id, base_model, spec, optimizer):
                model = self.base_model(base_model)
                check_adapter(spec, model.info)
                adapter = Adapter.initialised(model.info.linear_shapes, spec, model.decoder.device, optimizer)
                self._keep(adapter_id, LoadedAdapter(adapter, model))
            case LoadAdapter(adapter_id, base_model, state, trainable):
                model = self.base_model(base_model)
                check_adapter(state.spec, model.info)
                adapter = Adapter.from_state(model.info.linear_shapes, state, model.decoder.device, trainable)
                self._keep(adapter_id, LoadedAdapter(adapter, model))
            case CopyAdapter(source_id, adapter_id):
                source = self.get(source_id)
                self._keep(adapter_id, LoadedAdapter(source.adapter.frozen_copy(), source.model))
            case DropAdapter(adapter_id):
                self._drop(adapter_id)
            case ExportAdapter(adapter_id, with_optimizer):
                return self.get(adapter_id).adapter.state(with_optimizer)
        return None

    def base_model(self, name: str) -> LoadedModel:
        """Raises EngineError."""
        model = self._models.get(name)
        if model is None:
            raise EngineError(f"base model {name!r} is not loaded; loaded are: {', '.join(self._models)}")
        return model

    def get(self, adapter_id: str) -> LoadedAdapter:
        """Raises EngineDied: it was in another engine process, if anywhere."""
        loaded = self._adapters.get(adapter_id)
        if loaded is None:
            raise EngineDied(f"adapter {adapter_id!r} is not loaded in this engine process")
        self._fetch(loaded.adapter)
        return loaded

    def share_of_pass(self, part: RunLoss, num_rows: int) -> float:
        """Which part of the memory that a pass may have ``part`` needs; 0 where nothing is known of it."""
        loaded = self._adapters.get(part.adapter_id)
        memory = None if loaded is None else loaded.model.info.memory
        if loaded is None or memory is None:
            return 0.0
        needed = num_rows * memory.row_bytes + gradient_bytes(loaded.adapter.layout.num_parameters)
        return needed / (memory.pass_bytes - memory.fixed_bytes)

    def trainable(self, adapter_id: str) -> Adapter:
        """Raises EngineError, or InvalidInput for frozen weights."""
        adapter = self.get(adapter_id).adapter
        if not adapter.trainable:
            raise InvalidInput("adapter_id", adapter_id, "must be trainable, not frozen sampler weights")
        return adapter

    def for_sampling(self, adapter_id: str, base_model: str) -> Adapter:
        """The adapter as it is now: what is trained meanwhile must not reach a sequence that has begun. Raises
        EngineError."""
        loaded = self.get(adapter_id)
        if loaded.model is not self.base_model(base_model):
            raise EngineError(f"adapter {adapter_id!r} is of {loaded.model.info.name!r}, not of {base_model!r}")
        return loaded.adapter.frozen_copy() if loaded.adapter.trainable else loaded.adapter

    def _keep(self, adapter_id: str, loaded: LoadedAdapter) -> None:
        self._drop(adapter_id)
        self._adapters[adapter_id] = loaded
        self._fetch(loaded.adapter)

    def _drop(self, adapter_id: str) -> None:
        """Sequences that decode with it keep it until they end."""
        dropped = self._adapters.pop(adapter_id, None)
        if dropped is not None:
            dropped.model.trainer.forget(adapter_id)
            if self._pager is not None:
                self._pager.forget(dropped.adapter)

    def _fetch(self, adapter: Adapter) -> None:
        if self._pager is None:
            return
        self._of_turn.add(adapter)
        self._pager.fetch(adapter, self._of_turn.union(*(model.sampler.adapters for model in self.models)))
