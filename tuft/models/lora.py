"""LoRA adapters: one flat float32 buffer each, and views into it, so that an optimizer step is one pass over one array.

Linears that share their input form a *group* (q, k, v; gate, up): their A matrices lie one below the other, so one
product serves all of them. A B lies transposed, since products read it along its out_features; only the unembedding's
lies as it is, since single tokens' rows are read from it.

Shape letters: ``P`` an adapter's number of parameters, ``R`` rank times linears of a group, ``r`` rank, ``K``
in_features, ``N`` out_features.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from tuft.errors import InvalidInput, ModelError
from tuft.types import AdapterState, Float32Array, LoraSpec, Optimizer

PEFT_PREFIX = "base_model.model."
LM_HEAD = "lm_head"

MOMENTS: Mapping[Optimizer, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "dimuon": ("exp_avg",)}
"""What each optimizer keeps beside the weights, float32 and of their shape."""
_COPIES_FROZEN = 1.5
"""The weights, in float32 and in bf16."""

_GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_ATTENTION_GROUPS = frozenset({"qkv", "o"})


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """One group's matrices: ``A_RK`` of all its linears, and one ``B_Nr`` for each."""

    A_RK: Tensor
    Bs_Nr: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class StackedLora:
    """One group's matrices of S adapters that are alike: ``A_SRK`` and one ``B_SrN`` for each linear."""

    A_SRK: Tensor
    Bs_SrN: tuple[Tensor, ...]


def group_key(layer: int, group: str) -> str:
    return f"{layer}.{group}"


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Where one LoRA matrix lies in the flat buffer, transposed or not, and what PEFT calls it."""

    peft_name: str
    start: int
    shape: tuple[int, int]
    is_transposed: bool

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, flat_P: Tensor) -> Tensor:
        """The matrix within ``flat_P``, whose memory it shares."""
        part = flat_P[self.start : self.stop]
        return part.view(self.shape[::-1]).t() if self.is_transposed else part.view(self.shape)


@dataclass(frozen=True, slots=True)
class _GroupLayout:
    key: str
    As: tuple[_Matrix, ...]
    Bs: tuple[_Matrix, ...]


class LoraLayout:
    """Where every matrix of an adapter lies in its flat buffer."""

    def __init__(self, linear_shapes: Mapping[str, tuple[int, int]], spec: LoraSpec) -> None:
        self.num_parameters = 0
        self.groups: list[_GroupLayout] = []
        num_layers = sum(name.endswith(_GROUPS["qkv"][0]) for name in linear_shapes)
        for layer in range(num_layers):
            for group, linears in _GROUPS.items():
                if spec.train_attn if group in _ATTENTION_GROUPS else spec.train_mlp:
                    names = [f"model.layers.{layer}.{linear}" for linear in linears]
                    self._place(group_key(layer, group), names, linear_shapes, spec.rank)
        if spec.train_unembed:
            self._place(LM_HEAD, [LM_HEAD], linear_shapes, spec.rank)
        self.by_key = {group.key: group for group in self.groups}
        if not self.groups:
            raise InvalidInput("lora_config", spec, "must train at least one of attention, MLP and unembedding")

    def _place(self, key: str, names: list[str], shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
        transposed = key != LM_HEAD
        As = tuple(self._matrix(f"{name}.lora_A", (rank, shapes[name][1])) for name in names)
        Bs = tuple(self._matrix(f"{name}.lora_B", (shapes[name][0], rank), transposed) for name in names)
        self.groups.append(_GroupLayout(key, As, Bs))

    def _matrix(self, name: str, shape: tuple[int, int], is_transposed: bool = False) -> _Matrix:
        matrix = _Matrix(f"{PEFT_PREFIX}{name}.weight", self.num_parameters, shape, is_transposed)
        self.num_parameters = matrix.stop
        return matrix

    @property
    def matrices(self) -> list[_Matrix]:
        return [matrix for group in self.groups for matrix in (*group.As, *group.Bs)]

    def by_width(self, flat_P: Tensor) -> dict[int, list[Tensor]]:
        """The matrices within ``flat_P``, each with its rank first: every A as it is, every B transposed; those of one
        width together."""
        found: defaultdict[int, list[Tensor]] = defaultdict(list)
        for group in self.groups:
            for A in group.As:
                found[A.shape[1]].append(A.of(flat_P))
            for B in group.Bs:
                found[B.shape[0]].append(B.of(flat_P).t())
        return found

    def views(self, flat_P: Tensor) -> LoraViews:
        """The matrices within ``flat_P``, which shares their memory."""
        return LoraViews(self, flat_P)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """In_features and out_features of all linears but the unembedding, each number once."""
        groups = [group for group in self.groups if group.key != LM_HEAD]
        inner = {A.shape[1] for group in groups for A in group.As}
        return tuple(inner | {B.shape[0] for group in groups for B in group.Bs})

    def stacked(self, flat_SP: Tensor, key: str) -> StackedLora | None:
        """The group ``key`` within the flat buffers of several adapters; None if they have no such group."""
        group = self.by_key.get(key)
        if group is None:
            return None
        first, last = group.As[0], group.As[-1]
        A_SRK = flat_SP[:, first.start : last.stop].unflatten(1, (-1, first.shape[1]))
        Bs_SrN = []
        for B in group.Bs:
            B_S = flat_SP[:, B.start : B.stop]
            Bs_SrN.append(
                B_S.unflatten(1, B.shape[::-1]) if B.is_transposed else B_S.unflatten(1, B.shape).transpose(1, 2)
            )
        return StackedLora(A_SRK, tuple(Bs_SrN))

    def export(self, flat_P: Tensor) -> dict[str, Float32Array]:
        host_P = flat_P.cpu()
        return {matrix.peft_name: np.array(matrix.of(host_P).numpy(), order="C") for matrix in self.matrices}

    def fill(self, flat_P: Tensor, arrays: Mapping[str, Float32Array], field: str) -> None:
        """Copy ``arrays``, keyed as PEFT names them, into ``flat_P``. Raises InvalidInput naming field and tensor."""
        matrices = {matrix.peft_name: matrix for matrix in self.matrices}
        for name in arrays.keys() ^ matrices.keys():
            allowed = "this adapter needs it" if name in matrices else "this adapter has no such tensor"
            raise InvalidInput(f"{field}[{name}]", "present" if name in arrays else "missing", allowed)
        for name, matrix in matrices.items():
            array = np.asarray(arrays[name])
            if array.shape != matrix.shape:
                raise InvalidInput(f"{field}[{name}].shape", array.shape, f"must be {matrix.shape}")
            if not np.isfinite(array).all():
                raise InvalidInput(f"{field}[{name}]", "NaN or infinity", "must be finite")
            matrix.of(flat_P).copy_(torch.tensor(array, dtype=torch.float32))


class LoraViews(Mapping[str, LoraGroup]):
    """The matrices within a flat buffer, keyed as ``group_key`` names them, ``lm_head`` included; a group that the spec
    does not train is absent. A group's are made when they are asked for: there are hundreds."""

    def __init__(self, layout: LoraLayout, flat_P: Tensor) -> None:
        self._layout = layout
        self._flat_P = flat_P
        self._address, self._item_bytes = flat_P.data_ptr(), flat_P.element_size()
        self._made: dict[str, LoraGroup] = {}

    def __getitem__(self, key: str) -> LoraGroup:
        made = self._made.get(key)
        if made is None:
            group = self._layout.by_key[key]
            first, last = group.As[0], group.As[-1]
            A_RK = self._flat_P[first.start : last.stop].view(-1, first.shape[1])
            made = self._made[key] = LoraGroup(A_RK, tuple(B.of(self._flat_P) for B in group.Bs))
        return made

    def __contains__(self, key: object) -> bool:
        return key in self._layout.by_key

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.by_key)

    def __len__(self) -> int:
        return len(self._layout.by_key)

    def addresses(self, key: str) -> tuple[int, int]:
        """Where A and the first B of a group begin; 0 if there is no such group."""
        group = self._layout.by_key.get(key)
        if group is None:
            return 0, 0
        return (
            self._address + group.As[0].start * self._item_bytes,
            self._address + group.Bs[0].start * self._item_bytes,
        )


@lru_cache(maxsize=256)
def _layout(linear_shapes: tuple[tuple[str, tuple[int, int]], ...], spec: LoraSpec) -> LoraLayout:
    return LoraLayout(dict(linear_shapes), spec)


class Adapter:
    """One adapter's tensors on a device.

    ``params_P`` is the float32 master copy; ``moments`` are those that ``optimizer`` keeps, none unless ``trainable``;
    ``gradients_P`` is None until there are some. Whoever writes to ``params_P`` calls ``mark_updated`` afterwards.
    """

    def __init__(
        self,
        linear_shapes: Mapping[str, tuple[int, int]],
        spec: LoraSpec,
        device: torch.device,
        trainable: bool = True,
        optimizer: Optimizer = "adamw",
    ) -> None:
        self.spec = spec
        self.trainable = trainable
        self.optimizer: Optimizer = optimizer
        self.step = 0
        self.layout = _layout(tuple(linear_shapes.items()), spec)
        self.params_P = torch.zeros(self.layout.num_parameters, device=device)
        self.gradients_P: Tensor | None = None
        kept = MOMENTS[optimizer] if trainable else ()
        self.moments = {name: torch.zeros_like(self.params_P) for name in kept}
        self._params: dict[torch.dtype, Tensor] = {}
        self._views: dict[torch.dtype, LoraViews] = {}

    @classmethod
    def initialised(
        cls,
        linear_shapes: Mapping[str, tuple[int, int]],
        spec: LoraSpec,
        device: torch.device,
        optimizer: Optimizer = "adamw",
    ) -> Adapter:
        """A new trainable adapter: B zero, A uniform within 1 / sqrt(in_features) (Kaiming with a = sqrt(5), as PEFT
        does), drawn on the CPU from ``spec.seed`` alone: the same on every device and beside any neighbours."""
        adapter = cls(linear_shapes, spec, device, optimizer=optimizer)
        generator = torch.Generator()
        if spec.seed is None:
            generator.seed()
        else:
            generator.manual_seed(spec.seed)
        for group in adapter.layout.groups:
            for matrix in group.As:
                bound = 1 / math.sqrt(matrix.shape[1])
                drawn_rK = torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator)
                matrix.of(adapter.params_P).copy_(drawn_rK)
        return adapter

    @classmethod
    def from_state(
        cls,
        linear_shapes: Mapping[str, tuple[int, int]],
        state: AdapterState,
        device: torch.device,
        trainable: bool,
    ) -> Adapter:
        """Raises InvalidInput that names the tensor that is missing, unknown, of a wrong shape or not finite."""
        adapter = cls(linear_shapes, state.spec, device, trainable, state.optimizer)
        adapter.layout.fill(adapter.params_P, state.weights, "weights")
        if trainable:
            adapter.step = state.step
            for name, arrays in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
                if arrays and name not in adapter.moments:
                    raise InvalidInput(name, "present", f"{state.optimizer} keeps no such moment")
                if arrays:
                    adapter.layout.fill(adapter.moments[name], arrays, name)
            if state.gradients:
                adapter.gradients_P = torch.empty_like(adapter.params_P)
                adapter.layout.fill(adapter.gradients_P, state.gradients, "gradients")
        return adapter

    def frozen_copy(self) -> Adapter:
        """The present weights, for sampling."""
        copy = Adapter.__new__(Adapter)
        copy.spec, copy.layout, copy.step, copy.trainable = self.spec, self.layout, self.step, False
        copy.optimizer, copy.moments = self.optimizer, {}
        copy.params_P, copy.gradients_P, copy._views = self.params_P.clone(), None, {}
        copy._params = {}
        return copy

    def state(self, with_optimizer: bool) -> AdapterState:
        """Copies on the host, float32. Raises ModelError if the optimizer is asked of frozen weights."""
        weights = self.layout.export(self.params_P)
        if not with_optimizer:
            return AdapterState(self.spec, weights, step=self.step, optimizer=self.optimizer)
        if not self.trainable:
            raise ModelError("frozen sampler weights have no optimizer state")
        moments = {name: self.layout.export(moment_P) for name, moment_P in self.moments.items()}
        return AdapterState(
            self.spec,
            weights,
            exp_avg=moments.get("exp_avg", {}),
            exp_avg_sq=moments.get("exp_avg_sq", {}),
            gradients={} if self.gradients_P is None else self.layout.export(self.gradients_P),
            step=self.step,
            optimizer=self.optimizer,
        )

    @property
    def kind(self) -> tuple[int, bool, bool, bool]:
        """Adapters of one kind have matrices of the same sizes in the same places."""
        return self.spec.rank, self.spec.train_attn, self.spec.train_mlp, self.spec.train_unembed

    def params(self, dtype: torch.dtype) -> Tensor:
        """``params_P`` in ``dtype``: the master copy itself for float32, else a copy kept until ``mark_updated``."""
        if dtype == torch.float32:
            return self.params_P
        if dtype not in self._params:
            self._params[dtype] = self.params_P.to(dtype)
        return self._params[dtype]

    def views(self, dtype: torch.dtype) -> LoraViews:
        """The matrices within ``params(dtype)``."""
        if dtype not in self._views:
            self._views[dtype] = self.layout.views(self.params(dtype))
        return self._views[dtype]

    @property
    def num_bytes(self) -> int:
        """The most that it holds of memory."""
        copies = 1 + len(self.moments) if self.trainable else 0  # the gradients among them
        return int(self.params_P.nbytes * (_COPIES_FROZEN + copies))

    def move_to(self, device: torch.device) -> None:
        """Nothing happens if it is there."""
        if self.params_P.device != device:
            self._move(lambda x: x.to(device, non_blocking=True))

    def move_to_host(self) -> None:
        """Into memory that a GPU reads by itself, where it was on a GPU."""
        self._move(lambda x: x.cpu().pin_memory() if x.is_cuda else x.cpu())

    def _move(self, moved: Callable[[Tensor], Tensor]) -> None:
        self.params_P = moved(self.params_P)
        if self.gradients_P is not None:
            self.gradients_P = moved(self.gradients_P)
        self.moments = {name: moved(moment_P) for name, moment_P in self.moments.items()}
        self._params.clear()
        self._views.clear()

    def add_gradients(self, gradients_P: Tensor) -> None:
        """The first after a step become the adapter's own buffer: whoever gives them keeps no hold of them."""
        if self.gradients_P is None:
            self.gradients_P = gradients_P
        else:
            self.gradients_P.add_(gradients_P)

    def mark_updated(self) -> None:
        self._params.clear()
        self._views = {dtype: views for dtype, views in self._views.items() if dtype == torch.float32}


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows ``start:stop`` of a packed batch that use ``adapter``; rows outside every segment use the base
    model alone. ``gradients``: views of the float32 buffer that the adapter's gradients are added to, if wanted."""

    adapter: Adapter
    start: int
    stop: int
    gradients: LoraViews | None = None
