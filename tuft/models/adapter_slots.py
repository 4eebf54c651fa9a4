"""The adapters that decode, side by side in slots of one rank: the shapes of a decode step depend neither on who
decodes nor on ranks, so that a step can be captured once.

Shape letters: ``B`` rows of a step, ``K`` in_features, ``N`` out_features, ``S`` slots, ``R`` LoRA rows of a group of
linears, ``r`` those of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tuft.models.grouped_lora import ALIGNED, add_grouped, can_be_grouped
from tuft.models.lora import LM_HEAD, Adapter, LoraLayout, StackedLora
from tuft.types import LoraSpec


class AdapterSlots:
    """Slot 0 is no adapter. ``generation`` grows when the matrices are laid anew: what was captured before reads the
    old ones. Adapters must not change any more. The unembedding is not here: its product is no part of what is
    captured."""

    def __init__(self, linear_shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        self._layout = LoraLayout(linear_shapes, LoraSpec(rank=1, train_unembed=False))
        self._dtype, self._device = dtype, device
        self._rank = self._num_slots = 0
        self._matrices: dict[str, StackedLora] = {}
        self._slots: WeakKeyDictionary[Adapter, int] = WeakKeyDictionary()
        self.generation = 0

    @staticmethod
    def can_hold(linear_shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether adapters of these linears have matrices that grouped products take."""
        layout = LoraLayout(linear_shapes, LoraSpec(rank=1, train_unembed=False))
        return can_be_grouped(layout.widths, dtype, device)

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def matrices(self, key: str) -> StackedLora | None:
        """The group ``key`` of all slots; None if there is no slot at all."""
        return self._matrices.get(key)

    def place(self, adapters: Sequence[Adapter | None]) -> list[int]:
        """The slot of each, having put those there that had none; what is wanted by no one leaves first."""
        wanted = {adapter: None for adapter in adapters if adapter is not None}
        rank = max((adapter.spec.rank for adapter in wanted), default=0)
        if wanted and (rank > self._rank or len(wanted) >= self._num_slots):
            num_slots = power_of_two(len(wanted) + 1)
            self._lay(max(self._rank, power_of_two(rank, ALIGNED)), max(self._num_slots, num_slots))
        taken = {self._slots[adapter] for adapter in wanted if adapter in self._slots}
        free = [slot for slot in range(1, self._num_slots) if slot not in taken]
        for adapter in wanted:
            if adapter not in self._slots:
                slot = free.pop()
                for other in [other for other, of_other in self._slots.items() if of_other == slot]:
                    del self._slots[other]
                self._fill(slot, adapter)
        return [0 if adapter is None else self._slots[adapter] for adapter in adapters]

    def _lay(self, rank: int, num_slots: int) -> None:
        self._slots.clear()
        self._rank, self._num_slots = rank, num_slots
        self.generation += 1
        self._matrices.clear()  # before the new ones are made: both need not fit

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=self._dtype, device=self._device)

        for group in self._layout.groups:
            in_features = group.As[0].shape[1]
            Bs_SrN = tuple(zeros(rank, B.shape[0]) for B in group.Bs)
            self._matrices[group.key] = StackedLora(zeros(rank * len(Bs_SrN), in_features), Bs_SrN)

    def _fill(self, slot: int, adapter: Adapter) -> None:
        views = adapter.views(self._dtype)
        for key, slots in self._matrices.items():
            A_LrK = slots.A_SRK[slot].unflatten(0, (len(slots.Bs_SrN), -1))
            for matrix in (A_LrK, *(B_SrN[slot] for B_SrN in slots.Bs_SrN)):
                matrix.zero_()
            group = views.get(key)
            if group is not None:
                rank = adapter.spec.rank
                A_LrK[:, :rank] = group.A_RK.unflatten(0, (len(slots.Bs_SrN), -1))
                for B_SrN, B_Nr in zip(slots.Bs_SrN, group.Bs_Nr, strict=True):
                    B_SrN[slot, :rank] = B_Nr.t()
        self._slots[adapter] = slot


@dataclass(frozen=True, slots=True)
class SlotRows:
    """``decoding.DecodedRows`` whose adapters are in slots: rows in order of slot, those of slot s end before
    ``stops_S[s]`` (int32). ``scales_B1`` has the compute dtype."""

    slots: AdapterSlots
    stops_S: Tensor
    scales_B1: Tensor

    def add(self, y_BN: Tensor, x_BK: Tensor, key: str) -> None:
        """Every row's low-rank product at the group ``key``, added in place."""
        lora = self.slots.matrices(key) if key != LM_HEAD else None
        if lora is not None:
            add_grouped(y_BN, x_BK, lora, self.stops_S, self.scales_B1)


def power_of_two(number: int, least: int = 1) -> int:
    """``number`` rounded up to one, and at least ``least``."""
    return max(least, 1 << (number - 1).bit_length())
