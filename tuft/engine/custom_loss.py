"""Losses that clients wrote: a graph that torch.fx traced there, read and run by an interpreter of our own.

The wire format is that of the SDK (``tinker.types.CustomLossGraph``): nodes in the order in which they run, plain data.
Reading a graph checks all of it that does not depend on data: operators against the allow-list of ``custom_ops``,
references, arguments, outputs. Running it is bounded for each datum in elements and for each part in time. Whatever
goes wrong is a UserError that names the node; no other operation notices.

It runs on the CPU, whatever the engine computes on: its tensors are small, and devices then need not be thought of.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tuft.engine.custom_bounds import TENSOR_ELEMENTS, is_number, tensors_of
from tuft.engine.custom_ops import (
    ATTRIBUTES,
    DTYPES,
    FUNCTIONS,
    KEYWORDS,
    MAX_INT,
    METHODS,
    NEUTRAL,
    TEXTS,
    Operator,
)
from tuft.engine.losses import LossRecord, LossTerms
from tuft.errors import InvalidInput, UserError
from tuft.losses import CustomLoss

MAX_NODES = 2000
MAX_DEPTH = 6
"""Of arguments within arguments."""
MAX_ELEMENTS = 2**25
"""That all tensors made for one datum may have together: 128 MiB in float32, and as much again for their gradients."""
MAX_SECONDS = 2.0
"""That the data of one part may take."""
_MAX_INPUTS = 16
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_METRIC_KEY = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_FLOATS = ("inf", "-inf", "nan")
_CONSTANTS: Mapping[str, Mapping[str, Any]] = {
    "dtype": DTYPES,
    "device": {"cpu": torch.device("cpu")},
    "layout": {"strided": torch.strided},
    "memory_format": {
        "contiguous_format": torch.contiguous_format,
        "preserve_format": torch.preserve_format,
    },
}


@dataclass(frozen=True, slots=True)
class _Ref:
    """The result of an earlier node."""

    node: int


@dataclass(frozen=True, slots=True)
class _Slice:
    parts: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """``title`` names node and operator for the user."""

    title: str
    operator: Operator
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Program:
    """A graph that may run: its first values are the inputs, then each step's result; ``loss`` and ``metrics`` say
    which of them it gives."""

    inputs: tuple[tuple[str, int], ...]
    steps: tuple[_Step, ...]
    loss: _Ref
    metrics: Mapping[str, _Ref]

    def run(self, inputs: Sequence[Tensor], until_s: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one datum, scalars. Raises UserError. ``until_s``: of the monotonic clock."""
        values: list[Any] = list(inputs)
        num_left = MAX_ELEMENTS
        for step in self.steps:
            if time.monotonic() > until_s:
                raise UserError(f"{step.title}: the loss takes more than {MAX_SECONDS:g} s for the data of one pass")
            try:
                args, kwargs = _filled_in(step.args, values), _filled_in(step.kwargs, values)
                if step.operator.bound(*args, **kwargs) > num_left:
                    raise MemoryError(f"the loss makes tensors of more than {MAX_ELEMENTS} elements for one datum")
                result = step.operator.function(*args, **kwargs)
                num_left -= sum(tensor.numel() + TENSOR_ELEMENTS for tensor in tensors_of(result))
                _check_value(result)
            except Exception as error:  # whatever a client's own graph raises is that client's error
                raise UserError(f"{step.title}: {_first_line(error)}") from error
            values.append(result)
        loss = values[self.loss.node]
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            raise UserError(f"the loss must be a scalar floating-point tensor, not {_shown(loss)}")
        return loss, {name: _metric(name, values[ref.node]) for name, ref in self.metrics.items()}


def custom_terms(custom: CustomLoss) -> Callable[[LossRecord], LossTerms]:
    """The loss as one of scope ``datum``: to be called for each datum of a part, one after the other."""
    program, until_s = read_program(custom), 0.0

    def terms(record: LossRecord) -> LossTerms:
        nonlocal until_s
        until_s = until_s or time.monotonic() + MAX_SECONDS  # from the first datum on
        inputs = [record.logprobs_M, *(record.inputs[name] for name, _ in program.inputs[1:])]
        loss, metrics = program.run(inputs, until_s)
        if record.logprobs_M.requires_grad and not loss.requires_grad:
            raise UserError("the loss does not depend on logprobs, so it has no gradient")
        return LossTerms(loss, lambda: metrics)

    return terms


@lru_cache(maxsize=64)
def read_program(custom: CustomLoss) -> Program:
    """Raises InvalidInput that names the node, and its operator if that is not allowed."""
    _check_inputs(custom.inputs)
    nodes = json.loads(custom.nodes)
    if not isinstance(nodes, list) or not 1 <= len(nodes) <= MAX_NODES:
        found = len(nodes) if isinstance(nodes, list) else nodes
        raise InvalidInput("graph.nodes", found, f"must be 1 to {MAX_NODES} nodes")
    reader = _Reader()
    for index, node in enumerate(nodes):
        where = f"graph.nodes[{index}]"
        op, name, target = (_text(node, key, where) for key in ("op", "name", "target"))
        if op == "output" and index == len(nodes) - 1:
            return Program(custom.inputs, tuple(reader.steps), *reader.output(node, where))
        if not _NODE_NAME.fullmatch(name) or name in reader.refs:
            raise InvalidInput(f"{where}.name", name, "must be an identifier that no earlier node has")
        if index < len(custom.inputs):
            declared, _ = custom.inputs[index]
            if (op, target) != ("placeholder", declared) or node.get("args") or node.get("kwargs"):
                raise InvalidInput(where, f"{op} {target!r}", f"must be the placeholder of the input {declared!r}")
        else:
            reader.step(where, op, name, target, node)
        reader.refs[name] = _Ref(index)
    raise InvalidInput("graph.nodes", f"ends with {op!r}", "must end with an output")


class _Reader:
    """The nodes read so far: ``refs`` by their names."""

    def __init__(self) -> None:
        self.refs: dict[str, _Ref] = {}
        self.steps: list[_Step] = []

    def step(self, where: str, op: str, name: str, target: str, node: Mapping[str, Any]) -> None:
        tables = {"call_function": FUNCTIONS, "call_method": METHODS}
        if op not in tables:
            raise InvalidInput(f"{where} ({name})", f"{op} {target!r}", f"must be {' or '.join(tables)} here")
        operator = tables[op].get(target)
        if operator is None:
            kind = "function" if op == "call_function" else "method"
            raise InvalidInput(f"{where} ({name})", target, f"a custom loss may not call this {kind}")
        args = node.get("args", [])
        if not isinstance(args, list):
            raise InvalidInput(f"{where}.args", args, "must be a list")
        texts = ATTRIBUTES if target == "getattr" else TEXTS
        decoded = tuple(self.argument(arg, f"{where}.args[{i}]", texts) for i, arg in enumerate(args))
        if len(args) > operator.most_args:
            allowed = f"takes at most {operator.most_args} arguments by position here"
            raise InvalidInput(f"{where}.args", f"{len(args)} arguments", allowed)
        if op == "call_method" and not (decoded and isinstance(decoded[0], _Ref)):
            raise InvalidInput(f"{where}.args", args, "must begin with the tensor whose method it is")
        self.steps.append(_Step(f"node {name!r} ({target})", operator, decoded, self.keywords(node, where)))

    def keywords(self, node: Mapping[str, Any], where: str) -> dict[str, Any]:
        kwargs = node.get("kwargs", {})
        if not isinstance(kwargs, dict):
            raise InvalidInput(f"{where}.kwargs", kwargs, "must be an object")
        decoded = {}
        for key, arg in kwargs.items():
            value = self.argument(arg, f"{where}.kwargs.{key}")
            if key not in KEYWORDS and value not in NEUTRAL.get(key, ()):
                raise InvalidInput(f"{where}.kwargs", f"{key}={arg!r}", "a custom loss may not give this argument")
            if key in KEYWORDS:
                decoded[key] = value
        return decoded

    def argument(self, arg: Any, where: str, texts: Collection[str] = TEXTS, depth: int = 0) -> Any:
        """An argument as the wire has it, with references for what earlier nodes will give."""
        if depth > MAX_DEPTH:
            raise InvalidInput(where, "...", f"is nested more than {MAX_DEPTH} deep")
        if arg is None or isinstance(arg, bool | float):
            return arg
        if isinstance(arg, int) and -MAX_INT <= arg < MAX_INT:
            return arg
        if isinstance(arg, str) and arg in texts:
            return arg
        if isinstance(arg, list):
            return [self.argument(item, where, texts, depth + 1) for item in arg]
        if isinstance(arg, dict) and len(arg) == 1:
            ((kind, value),) = arg.items()
            if kind == "ref" and isinstance(value, str):
                return self.ref(value, where)
            if kind == "tuple" and isinstance(value, list):
                return tuple(self.argument(item, where, texts, depth + 1) for item in value)
            if kind == "slice" and isinstance(value, list) and len(value) == 3:
                return _Slice(tuple(self.argument(item, where, texts, depth + 1) for item in value))
            if kind == "ellipsis" and value is True:
                return ...
            if kind == "float" and value in _FLOATS:
                return float(value)
            if kind in _CONSTANTS and isinstance(value, str) and value in _CONSTANTS[kind]:
                return _CONSTANTS[kind][value]
        raise InvalidInput(where, arg, "a custom loss may not give this argument")

    def ref(self, name: str, where: str) -> _Ref:
        if name not in self.refs:
            raise InvalidInput(where, name, "no node before this one has that name")
        return self.refs[name]

    def output(self, node: Mapping[str, Any], where: str) -> tuple[_Ref, dict[str, _Ref]]:
        """``(loss, {name: metric})``, all of them nodes."""
        args = node.get("args")
        returned = args[0] if isinstance(args, list) and len(args) == 1 else None
        if isinstance(returned, dict) and len(returned) == 1:
            returned = returned.get("tuple")
        loss, metrics = returned if isinstance(returned, list) and len(returned) == 2 else (None, None)
        metrics = metrics.get("dict") if isinstance(metrics, dict) and len(metrics) == 1 else None
        if not isinstance(metrics, dict):
            raise InvalidInput(f"{where}.args", args, "must be (loss, {name: metric})")
        for name in metrics:
            if not _METRIC_KEY.fullmatch(name):
                raise InvalidInput(f"{where}.args", name, "metrics are named custom/<name>:sum or custom/<name>:mean")
        loss, *values = (self.argument(arg, f"{where}.args") for arg in (loss, *metrics.values()))
        if not all(isinstance(value, _Ref) for value in (loss, *values)):
            raise InvalidInput(f"{where}.args", args, "loss and metrics must be results of nodes")
        return loss, dict(zip(metrics, values, strict=True))


def _check_inputs(inputs: Sequence[tuple[str, int]]) -> None:
    names = [name for name, _ in inputs]
    if not 1 <= len(inputs) <= _MAX_INPUTS or names[0] != "logprobs" or inputs[0][1] == 0:
        raise InvalidInput("inputs", names, f"must be logprobs, of rank 1 or 2, and at most {_MAX_INPUTS - 1} others")
    for index, (name, rank) in enumerate(inputs):
        if not _INPUT_NAME.fullmatch(name) or names.index(name) != index:
            raise InvalidInput(f"inputs[{index}].name", name, "must be a lower-case name, unlike the others")
        if rank not in (0, 1, 2):
            raise InvalidInput(f"inputs[{index}].rank", rank, "must be 0, 1 or 2")


def _text(node: Any, key: str, where: str) -> str:
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, str) or len(value) > 200:
        raise InvalidInput(f"{where}.{key}", value, "must be a text of at most 200 characters")
    return value


def _filled_in(template: Any, values: Sequence[Any]) -> Any:
    """``template`` with values for its references."""
    if isinstance(template, _Ref):
        return values[template.node]
    if isinstance(template, _Slice):
        return slice(*(_filled_in(part, values) for part in template.parts))
    if isinstance(template, list | tuple):
        return type(template)(_filled_in(item, values) for item in template)
    if isinstance(template, dict):
        return {key: _filled_in(item, values) for key, item in template.items()}
    return template


def _check_value(value: Any) -> None:
    """Results are tensors, numbers, and what is made of these; nothing that could be called or reached into."""
    if isinstance(value, tuple | list):
        for item in value:
            _check_value(item)
    elif isinstance(value, int) and not -MAX_INT <= value < MAX_INT:
        raise OverflowError("the result has more than 64 bits")
    elif not (is_number(value) or isinstance(value, Tensor | torch.dtype | torch.device)):
        raise TypeError(f"gives a {type(value).__name__}")


def _metric(name: str, value: Any) -> Tensor:
    if is_number(value):
        return torch.tensor([value], dtype=torch.float32)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        raise UserError(f"the metric {name} must be a scalar, not {_shown(value)}")
    return value.detach().reshape(1).float()


def _shown(value: Any) -> str:
    return f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
