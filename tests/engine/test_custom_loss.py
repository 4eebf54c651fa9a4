"""Losses that clients wrote: computed as torch computes them there, and harmless whatever they hold."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss
from torch import Tensor

from tests.engine.policy import policy_data
from tests.engine.reference import relative_error
from tests.engine.test_losses import LENGTHS, new_adapter
from tests.engine.test_trainer import (
    cross_entropy,
    gradients_of,
    in_parts,
    run_all,
    run_one,
    tiny_decoder,
)
from tuft.engine import custom_loss
from tuft.engine.base import RunLoss
from tuft.engine.custom_loss import MAX_ELEMENTS, MAX_NODES, read_program
from tuft.engine.trainer import Trainer
from tuft.errors import InvalidInput, UserError
from tuft.losses import CustomLoss
from tuft.types import Datum, LossResult

Fn = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def traced(fn: Fn, **ranks: int) -> CustomLoss:
    """As the SDK sends it."""
    handle = trace_loss(fn, {"logprobs": 1, **ranks}, "session")  # type: ignore[arg-type, dict-item]
    nodes = [node.model_dump() for node in encode_graph(handle).nodes]
    return CustomLoss(handle.name, tuple((given.name, given.rank) for given in handle.inputs), json.dumps(nodes))


def graph(*nodes: Mapping[str, Any], inputs: tuple[tuple[str, int], ...] = (("logprobs", 1),)) -> CustomLoss:
    """Hand-written; the placeholders come by themselves."""
    placeholders = [node("placeholder", name, name) for name, _ in inputs]
    return CustomLoss("written", inputs, json.dumps([*placeholders, *nodes]))


def node(op: str, name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


P, TOTAL = ref("logprobs"), node("call_method", "total", "sum", ref("logprobs"))
OUTPUT = node("output", "output", "output", {"tuple": [ref("total"), {"dict": {}}]})


def run(custom: CustomLoss, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return read_program(custom).run(inputs, time.monotonic() + 60)


# --- it computes what the client's torch computes ---------------------------------------------------------------------


def clipped(logprobs: Tensor, q: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    mask = advantages != 0
    ratio = torch.exp(torch.where(mask, logprobs - q, torch.zeros_like(q)))
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    num = mask.float().sum().clamp(min=1.0)
    kl = ((q - logprobs) * mask).sum() / num
    loss = -surrogate.sum() + 0.1 * F.huber_loss(logprobs, q, reduction="sum")
    return loss, {"custom/kl:mean": kl, "custom/num_clipped:sum": ((ratio > 1.2) & mask).sum()}


def everything(logprobs: Tensor, q: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Some of each family of operators."""
    num = logprobs.shape[0]
    x = -torch.softmax(logprobs, dim=0) @ q + math.sqrt(num) / math.exp(0.1 * logprobs.size(0))
    index = torch.arange(num, device=logprobs.device)
    pairs = (logprobs[:, None] - logprobs[None, :]).abs().masked_fill(index[:, None] == index, 0.0)
    best = logprobs.max(dim=0).values + q.topk(2)[0][1] + torch.sort(q, descending=True).values[0]
    tail = F.pad(logprobs[1:-1], (0, 2))[::2].cumsum(0).flip(0)[advantages[::2] > 0].sum()
    stacked = torch.stack([logprobs, q], dim=-1).reshape(-1, 2).t().expand(2, -1)[0, ...]
    chosen = logprobs.gather(0, index.flip(0)) * q[index] + torch.zeros(num, dtype=q.dtype)
    odd = (index % 2 == 1).to(logprobs.dtype) * (2.0**logprobs) + index // 3
    smooth = F.softplus(logprobs) + F.logsigmoid(q) + torch.special.expit(advantages) + logprobs.float().square()
    first, second = logprobs.chunk(2)
    total = x + best + tail + pairs.mean() + stacked.sum() + chosen.logsumexp(0) + odd.sum() + smooth.std()
    return total + first.norm() - second.detach().prod(), {"custom/x:sum": x, "custom/n:mean": pairs.numel() * x}


def a_matrix(logprobs: Tensor, weights: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Ranks 2, 2 and 0."""
    return -(logprobs * weights).sum() * scale, {"custom/entropy:mean": -(logprobs.exp() * logprobs).sum(-1).mean()}


@pytest.mark.parametrize("fn", [clipped, everything])
def test_a_traced_loss_gives_what_it_gives_its_client_gradients_too(fn: Fn) -> None:
    program = traced(fn, q=1, advantages=1)
    generator = torch.Generator().manual_seed(0)
    for length in (12, 40):
        inputs = [torch.randn(length, generator=generator) for _ in range(3)]
        ours, theirs = (inputs[0].clone().requires_grad_() for _ in range(2))
        loss, metrics = run(program, ours, *inputs[1:])
        expected, expected_metrics = fn(theirs, *inputs[1:])
        assert loss.item() == expected.item()
        assert {key: value.item() for key, value in metrics.items()} == {
            key: pytest.approx(value.item(), rel=1e-6) for key, value in expected_metrics.items()
        }
        loss.backward()
        expected.backward()
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def datum_inputs(datum: Datum, scale: float) -> Datum:
    inputs = datum.loss_fn_inputs
    given = {"q": inputs["logprobs"], "advantages": inputs["advantages"], "scale": np.array([scale], np.float32)}
    return replace(datum, loss_fn_inputs={"target_tokens": inputs["target_tokens"], **given})


def custom_data(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Datum, ...]:
    data = policy_data(tiny_decoder("float32").config.vocab_size, lengths, seed=seed)
    return tuple(datum_inputs(datum, index) for index, datum in enumerate(data))


def custom(loss: CustomLoss, data: tuple[Datum, ...], adapter_id: str = "a", backward: bool = True) -> RunLoss:
    return RunLoss(adapter_id, data, "custom", (("loss_id", "any"),), backward, custom_loss=loss)


def linear_of(fn: Fn, data: tuple[Datum, ...], result: LossResult) -> tuple[float, dict[str, list[float]], RunLoss]:
    """The client-side way: the loss of the logprobs, its metrics, and cross_entropy with its gradient."""
    total, metrics, linear = 0.0, {}, []  # type: ignore[var-annotated]
    for datum, logprobs in zip(data, result.logprobs, strict=True):
        p = torch.tensor(logprobs, requires_grad=True)
        inputs = datum.loss_fn_inputs
        loss, values = fn(p, *(torch.tensor(inputs[name]) for name in ("q", "advantages")))
        loss.backward()
        total += loss.item()
        for name, value in values.items():
            metrics.setdefault(name, []).append(value.item())
        assert p.grad is not None
        weights = {"target_tokens": inputs["target_tokens"], "weights": -p.grad.numpy()}
        linear.append(replace(datum, loss_fn_inputs=weights))
    return total, metrics, cross_entropy("a", tuple(linear))


@pytest.mark.parametrize("max_rows", [48, 4096])
def test_one_pass_here_is_the_clients_two_passes(max_rows: int) -> None:
    decoder = tiny_decoder("float32")
    adapter, two_passes, data = new_adapter(decoder), new_adapter(decoder), custom_data()
    result = run_one(Trainer(decoder, max_rows), custom(traced(clipped, q=1, advantages=1), data), adapter)
    loss, metrics, linear = linear_of(clipped, data, result)
    assert result.metrics == pytest.approx(
        {
            "loss:sum": loss,
            "custom/kl:mean": np.mean(metrics["custom/kl:mean"]),
            "custom/num_clipped:sum": np.sum(metrics["custom/num_clipped:sum"]),
        },
        rel=1e-5,
    )
    run_one(Trainer(decoder, max_rows), linear, two_passes)
    assert relative_error(gradients_of(adapter).numpy(), gradients_of(two_passes).numpy()) < 1e-6


def test_ranks_0_and_2_arrive_as_declared() -> None:
    decoder = tiny_decoder("float32")
    (datum,) = custom_data((6,))
    targets = np.stack([datum.loss_fn_inputs["target_tokens"], np.zeros(6, np.int64)], axis=1)
    weights = np.array([[1.0, 0.5]] * 6, np.float32)
    soft = Datum(datum.tokens_T, {"target_tokens": targets, "weights": weights, "scale": np.array([2.0], np.float32)})
    loss = traced(a_matrix, weights=2, scale=0, logprobs=2)
    adapter, doubled = new_adapter(decoder), new_adapter(decoder)
    result = run_one(Trainer(decoder, 64), custom(loss, (soft,)), adapter)
    assert result.logprobs[0].shape == (6, 2)
    assert result.metrics["loss:sum"] == pytest.approx(-2 * (result.logprobs[0] * weights).sum(), rel=1e-5)
    twice = replace(soft, loss_fn_inputs={"target_tokens": targets, "weights": 2 * weights})
    run_one(Trainer(decoder, 64), cross_entropy("a", (twice,)), doubled)
    assert relative_error(gradients_of(adapter).numpy(), gradients_of(doubled).numpy()) < 1e-6
    error = run_all(Trainer(decoder, 64), [custom(loss, (datum,))], {"a": adapter})[0]
    assert "data[0].loss_fn_inputs" in str(error)


def test_it_is_bit_equal_in_company_and_alone() -> None:
    decoder, loss = tiny_decoder("float32"), traced(clipped, q=1, advantages=1)
    data = {name: custom_data(LENGTHS, seed) for seed, name in enumerate(("mine", "other"))}
    alone, fused = new_adapter(decoder), new_adapter(decoder)
    expected = run_one(Trainer(decoder, 512), custom(loss, data["mine"], "mine"), alone)
    others = cross_entropy("third", policy_data(decoder.config.vocab_size, (33, 5)))
    adapters = {"mine": fused, "other": new_adapter(decoder), "third": new_adapter(decoder)}
    operations = [others, *(custom(loss, of, name) for name, of in data.items())]
    result = run_all(Trainer(decoder, 512), operations, adapters)[1]
    assert isinstance(result, LossResult)
    assert result.metrics == expected.metrics
    assert torch.equal(gradients_of(fused), gradients_of(alone))


def test_a_forward_gives_loss_and_metrics_and_no_gradient() -> None:
    decoder, loss, adapter = (
        tiny_decoder("float32"),
        traced(clipped, q=1, advantages=1),
        new_adapter(tiny_decoder("float32")),
    )
    forward = run_one(Trainer(decoder, 48), custom(loss, custom_data(), backward=False), adapter)
    assert adapter.gradients_P is None
    assert forward.metrics == run_one(Trainer(decoder, 48), custom(loss, custom_data()), adapter).metrics


# --- what fails, fails alone ------------------------------------------------------------------------------------------


def no_gradient(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return logprobs.detach().sum(), {}


def not_scalar(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return logprobs * 2, {}


def root_of_zero(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.sqrt((logprobs * 0).abs()).sum(), {}


def infinite(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (logprobs / 0).sum(), {}


def mismatched(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (logprobs[1:] * logprobs).sum(), {}


def no_derivative(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (logprobs // 2).sum(), {}


def long_metric(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return logprobs.sum(), {"custom/all:sum": logprobs}


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (no_gradient, "data[0]: custom loss 'no_gradient': the loss does not depend on logprobs"),
        (not_scalar, "must be a scalar floating-point tensor, not torch.float32 of shape [30]"),
        (root_of_zero, "data[0]: custom loss 'root_of_zero': the gradient of the loss is not finite"),
        (infinite, "data[0].loss_fn_inputs: the loss is not finite"),
        (mismatched, "node 'mul' (operator.mul): "),
        (no_derivative, "custom loss 'no_derivative': derivative for aten::floor_divide is not implemented"),
        (long_metric, "the metric custom/all:sum must be a scalar, not torch.float32 of shape [30]"),
    ],
)
def test_a_loss_that_fails_is_its_own_operations_error(fn: Fn, message: str) -> None:
    decoder = tiny_decoder("float32")
    alone, fused, failing = (new_adapter(decoder) for _ in range(3))
    mine = cross_entropy("mine", policy_data(decoder.config.vocab_size, (9, 17)))
    expected = run_one(Trainer(decoder, 512), mine, alone)
    adapters = {"mine": fused, "a": failing}
    error, result = run_all(Trainer(decoder, 512), [custom(traced(fn), custom_data()), mine], adapters)
    assert isinstance(error, UserError)
    assert message in str(error)
    assert failing.gradients_P is None
    assert isinstance(result, LossResult)
    assert result.metrics == expected.metrics
    assert torch.equal(gradients_of(fused), gradients_of(alone))


def fails_when_negative(logprobs: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return logprobs.sum() * torch.sqrt(2.5 - scale), {}


def test_the_datum_that_fails_is_named_by_its_place_in_the_operation() -> None:
    decoder, adapter = tiny_decoder("float32"), new_adapter(tiny_decoder("float32"))
    of = custom(traced(fails_when_negative, scale=0), custom_data((30, 30, 30, 30)))
    *_, last = (run_all(Trainer(decoder, 48), [part], {"a": adapter})[0] for part in [replace(of, data=of.data[2:])])
    assert "data[1]" in str(last)
    trainer = Trainer(decoder, 48)
    replies = [run_all(trainer, [part], {"a": adapter})[0] for part in in_parts(of, 48)]
    assert replies[:3] == [None] * 3
    assert "data[3]" in str(replies[3])


def test_a_loss_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_loss, "MAX_SECONDS", -1.0)
    decoder, adapter = tiny_decoder("float32"), new_adapter(tiny_decoder("float32"))
    (error,) = run_all(
        Trainer(decoder, 512), [custom(traced(clipped, q=1, advantages=1), custom_data())], {"a": adapter}
    )
    assert "data[0]: custom loss 'clipped': node 'ne' (operator.ne): the loss takes more than" in str(error)


# --- what a graph may not hold ----------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("call_function", "x", "os.system", "ls")], "(x): got 'os.system'; a custom loss may not call this func"),
        ([node("call_function", "x", "builtins.eval", "1")], "got 'builtins.eval'; a custom loss may not call"),
        ([node("call_function", "x", "torch.load", "/tmp/x")], "got 'torch.load'; a custom loss may not call"),
        ([node("call_function", "x", "torch.empty", 4)], "got 'torch.empty'; a custom loss may not call this function"),
        ([node("call_function", "x", "torch.rand", 4)], "got 'torch.rand'; a custom loss may not call this function"),
        ([node("call_function", "x", "operator.setitem", P, 0, 0)], "'operator.setitem'; a custom loss may not call"),
        ([node("call_function", "x", "torch.ops.aten.add", P, 0)], "'torch.ops.aten.add'; a custom loss may not call"),
        ([node("call_function", "x", "_operator.add", P, 0)], "'_operator.add'; a custom loss may not call this"),
        *[
            ([node("call_method", "x", method, P)], f"got '{method}'; a custom loss may not call this method")
            for method in (
                *("backward", "numpy", "share_memory_", "item", "tolist", "add_", "copy_", "__class__", "data_ptr"),
                *("requires_grad_", "cuda", "register_hook", "__reduce__", "storage", "new_empty", "set_", "apply_"),
            )
        ],
        *[
            ([node("call_function", "x", "getattr", P, name)], f"got '{name}'; a custom loss may not give this")
            for name in ("__class__", "grad_fn", "data", "__dict__", "sum", "grad", "_base", "is_cuda")
        ],
        ([node("call_function", "x", "getattr", P, {"float": "nan"})], ""),
        ([node("call_module", "x", "layer", P)], "got \"call_module 'layer'\"; must be call_function or call_method"),
        ([node("get_attr", "x", "weight")], "got \"get_attr 'weight'\"; must be call_function or call_method here"),
        ([node("placeholder", "x", "x")], "got \"placeholder 'x'\"; must be call_function or call_method here"),
        ([node("output", "x", "output"), TOTAL], "got \"output 'output'\"; must be call_function or call_method"),
        ([node("call_method", "x", "sum", ref("total"))], "graph.nodes[1].args[0]: got 'total'; no node before this"),
        ([node("call_method", "x", "sum", ref("x"))], "graph.nodes[1].args[0]: got 'x'; no node before this one"),
        ([node("call_method", "x", "sum", 3)], "graph.nodes[1].args: got [3]; must begin with the tensor whose"),
        ([node("call_method", "x", "sum")], "graph.nodes[1].args: got []; must begin with the tensor whose method"),
        ([node("call_method", "logprobs", "sum", P)], "name: got 'logprobs'; must be an identifier that no earlier"),
        ([node("call_method", "x y", "sum", P)], "graph.nodes[1].name: got 'x y'; must be an identifier"),
        ([node("call_method", "x", "sum", P, nested(10))], "is nested more than 6 deep"),
        ([node("call_method", "x", "sum", P, {"tuple": [0], "ref": "logprobs"})], "may not give this argument"),
        ([node("call_method", "x", "sum", P, {"dict": {}})], "got {'dict': {}}; a custom loss may not give this"),
        ([node("call_method", "x", "sum", P, {})], "got {}; a custom loss may not give this argument"),
        ([node("call_method", "x", "sum", P, "dim")], "got 'dim'; a custom loss may not give this argument"),
        ([node("call_method", "x", "sum", P, 10**30)], "args[1]: got 1000000000000000000000000000000; a custom loss"),
        ([node("call_method", "x", "to", P, {"device": "cuda:0"})], "got {'device': 'cuda:0'}; a custom loss may"),
        ([node("call_method", "x", "to", P, {"dtype": "complex64"})], "got {'dtype': 'complex64'}; a custom loss may"),
        ([node("call_method", "x", "sum", P, {"float": "1e9"})], "got {'float': '1e9'}; a custom loss may not give"),
        ([node("call_method", "x", "sum", P, {"slice": [0, 1]})], "got {'slice': [0, 1]}; a custom loss may not"),
        ([node("call_function", "x", "torch.add", P, P, out=P)], "got \"out={'ref': 'logprobs'}\"; a custom loss may"),
        ([node("call_function", "x", "torch.zeros", 2, requires_grad=True)], "got 'requires_grad=True'; a custom"),
        ([node("call_function", "x", "torch.nn.functional.relu", P, inplace=True)], "got 'inplace=True'; a custom"),
        ([node("call_function", "x", "torch.nn.functional.relu", P, True)], "got '2 arguments'; takes at most 1"),
        ([node("call_function", "x", "torch.norm", P, 2, None, False, P)], "got '5 arguments'; takes at most 4"),
        ([node("call_function", "x", "torch.add", P, P, generator=1)], "got 'generator=1'; a custom loss may not"),
        ([{"op": "call_method", "name": "x", "target": "sum", "args": {}}], "graph.nodes[1].args: got {}; must be a l"),
        ([{**TOTAL, "kwargs": []}], "graph.nodes[1].kwargs: got []; must be an object"),
        ([{"op": 1, "name": "x", "target": "sum"}], "graph.nodes[1].op: got 1; must be a text"),
        ([7], "graph.nodes[1].op: got None; must be a text"),
        ([{**TOTAL, "name": "x" * 300}], "graph.nodes[1].name: got 'xxx"),
        ([TOTAL] * (MAX_NODES + 1), f"graph.nodes: got {MAX_NODES + 3}; must be 1 to {MAX_NODES} nodes"),
    ],
)
def test_what_is_not_allowed_is_refused_when_the_loss_is_created(nodes: list[Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_program(graph(*nodes, OUTPUT))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([], "must end with an output"),
        ([{**OUTPUT, "args": []}], "must be (loss, {name: metric})"),
        ([{**OUTPUT, "args": [{"tuple": [ref("total")]}]}], "must be (loss, {name: metric})"),
        ([{**OUTPUT, "args": [{"tuple": [ref("total"), []]}]}], "must be (loss, {name: metric})"),
        ([{**OUTPUT, "args": [{"tuple": [1.0, {"dict": {}}]}]}], "loss and metrics must be results of nodes"),
        ([{**OUTPUT, "args": [{"tuple": [ref("nobody"), {"dict": {}}]}]}], "got 'nobody'; no node before this one"),
        *[
            ([{**OUTPUT, "args": [[ref("total"), {"dict": {name: ref("total")}}]]}], f"got {name!r}; metrics are named")
            for name in ("loss:sum", "custom/x", "custom/X:sum", "custom/x:max", "custom/a:b:sum", "custom/:sum")
        ],
        ([{**OUTPUT, "args": [[ref("total"), {"dict": {"custom/x:sum": 1}}]]}], "must be results of nodes"),
    ],
)
def test_a_loss_returns_itself_and_metrics_that_are_named_as_such(output: list[Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_program(graph(TOTAL, *output))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "inputs",
    [
        *((), (("q", 1),), (("logprobs", 0),), (("logprobs", 1), ("Q", 1)), (("logprobs", 1), ("logprobs", 1))),
        *((("logprobs", 1), ("q", 3)), (("logprobs", 1), *((f"q{index}", 1) for index in range(16)))),
    ],
)
def test_inputs_are_logprobs_and_a_few_others(inputs: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(InvalidInput, match="inputs"):
        read_program(graph(TOTAL, OUTPUT, inputs=inputs))


def test_placeholders_are_the_declared_inputs_in_their_order() -> None:
    nodes = [node("placeholder", name, name) for name in ("logprobs", "b", "a")]
    declared = (("logprobs", 1), ("a", 1), ("b", 1))
    with pytest.raises(InvalidInput, match="must be the placeholder of the input 'a'"):
        read_program(CustomLoss("swapped", declared, json.dumps([*nodes, TOTAL, OUTPUT])))
    with pytest.raises(InvalidInput, match="must be the placeholder of the input 'logprobs'"):
        read_program(CustomLoss("default", declared, json.dumps([node("placeholder", "logprobs", "logprobs", 1)])))


# --- what a graph may not do ------------------------------------------------------------------------------------------


def repeated(function: str, name: str, times: int, *args: Any) -> list[dict[str, Any]]:
    """``name_1 = function(name_0, args)``, and so on; name_0 is given."""
    return [
        node("call_function", f"{name}_{i + 1}", function, ref(f"{name}_{i}"), *(args or (ref(f"{name}_{i}"),)))
        for i in range(times)
    ]


def size_node(name: str = "n") -> dict[str, Any]:
    return node("call_method", name, "size", P, 0)


HUGE = 2**40


@pytest.mark.parametrize(
    "nodes",
    [
        [node("call_method", "x", "repeat", P, HUGE)],
        [node("call_method", "x", "repeat", P, 2**20, 2**20)],
        [node("call_function", "x", "torch.tile", P, {"tuple": [HUGE]})],
        [node("call_function", "x", "torch.repeat_interleave", P, HUGE)],
        [node("call_method", "x", "expand", P, HUGE, -1), node("call_method", "y", "contiguous", ref("x"))],
        [node("call_function", "x", "torch.broadcast_to", P, {"tuple": [HUGE, 30]})],
        [node("call_function", "x", "torch.zeros", HUGE)],
        [node("call_function", "x", "torch.zeros", size=[HUGE])],
        [node("call_function", "x", "torch.full", [2**20, 2**20], 1.0)],
        [node("call_method", "x", "new_ones", P, {"tuple": [2**30, 2**30, 2**30]})],
        [node("call_method", "x", "new_full", P, [HUGE], 0.5)],
        [node("call_function", "x", "torch.arange", HUGE)],
        [node("call_function", "x", "torch.arange", 0, 1, 1e-12)],
        [node("call_function", "x", "torch.arange", 0, {"float": "inf"})],
        [node("call_function", "x", "torch.linspace", 0, 1, HUGE)],
        [node("call_function", "x", "torch.nn.functional.pad", P, {"tuple": [0, HUGE]})],
        [
            node("call_function", "a", "torch.arange", 2**13),
            node("call_function", "x", "torch.outer", ref("a"), ref("a")),
        ],
        [
            node("call_function", "a", "torch.arange", 2**13),
            node("call_function", "b", "operator.getitem", ref("a"), {"tuple": [{"ellipsis": True}, None]}),
            node("call_function", "x", "operator.mul", ref("a"), ref("b")),
        ],
        [
            node("call_function", "a", "torch.zeros", 2**13, 2**10),
            node("call_function", "i", "torch.zeros", 2**20, dtype={"dtype": "int64"}),
            node("call_function", "x", "operator.getitem", ref("a"), ref("i")),
        ],
        [
            node("call_function", "a", "torch.zeros", 2**6, 2**14),
            node("call_function", "i", "torch.zeros", 2**12, dtype={"dtype": "int64"}),
            node("call_function", "x", "torch.index_select", ref("a"), 0, ref("i")),
        ],
        [
            node("call_function", "a", "torch.zeros", 2**12, 2**12),
            node("call_function", "x", "operator.matmul", ref("a"), ref("a")),
        ],
        [node("call_function", "a", "torch.zeros", 2**24), node("call_method", "x", "unbind", ref("a"))],
        [node("call_function", "a_0", "torch.zeros", 2**20), *repeated("operator.add", "a", 40, 1)],
        [
            node("call_method", "a_0", "clone", P),
            *(node("call_function", f"a_{i + 1}", "torch.cat", [ref(f"a_{i}")] * 2) for i in range(40)),
        ],
    ],
)
def test_no_graph_fills_the_memory(nodes: list[dict[str, Any]]) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=f"more than {MAX_ELEMENTS} elements|cannot convert float infinity"):
        run(graph(*nodes, TOTAL, OUTPUT), torch.zeros(30))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([size_node("x_0"), *repeated("operator.mul", "x", 70)], "more than 64 bits"),
        ([size_node(), node("call_function", "x", "operator.pow", ref("n"), 10**9)], "30 to the power of 1000000000"),
        (
            [size_node(), node("call_function", "x", "operator.pow", 2.5, 10**9)],
            "Numerical result out of range|Result too large",
        ),
        (
            [size_node(), node("call_function", "x", "operator.floordiv", ref("n"), 0)],
            "division by zero|modulo by zero",
        ),
        ([node("call_function", "x", "math.exp", P)], "takes numbers, not tensors"),
        ([node("call_function", "x", "math.exp", 1e9)], "math range error"),
        ([node("call_function", "x", "operator.add", [1], [2])], "takes tensors and numbers"),
        ([node("call_function", "x", "operator.mul", {"tuple": [0]}, 10**9)], "takes tensors and numbers"),
        ([node("call_function", "x", "operator.mul", "sum", 10**9)], "takes tensors and numbers"),
        ([node("call_function", "x", "operator.getitem", "sum", 0)], "only tensors and tuples are indexed"),
        ([node("call_function", "x", "operator.getitem", P, [0, 1])], "an index must be an integer, a slice"),
        (
            [node("call_function", "x", "operator.getitem", P, {"slice": [P, None, None]})],
            "an index must be an integer",
        ),
        ([node("call_function", "x", "getattr", P, "values")], "a Tensor has no values"),
        ([size_node(), node("call_function", "x", "getattr", ref("n"), "shape")], "a int has no shape"),
        ([node("call_function", "x", "getattr", P, "shape", 1)], "node 'x' (getattr): "),
        ([node("call_method", "x", "type", P)], "gives a str"),
        ([node("call_method", "x", "view", P, {"dtype": "uint8"})], "sizes must be integers"),
        ([node("call_method", "x", "repeat", P, P)], "sizes must be integers"),
        ([node("call_function", "x", "torch.arange", P)], "takes numbers, not tensors"),
        ([size_node(), node("call_method", "x", "sum", ref("n"))], "node 'x' (sum): "),
        ([node("call_method", "x", "norm", P, "sum")], "node 'x' (norm): "),
    ],
)
def test_what_goes_wrong_in_a_node_names_the_node(nodes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(graph(*nodes, TOTAL, OUTPUT), torch.zeros(30))
    assert any(part in str(caught.value) for part in message.split("|"))
    assert "node 'x" in str(caught.value)


def test_inputs_stay_as_they_were() -> None:
    p = torch.arange(5.0)
    with torch.no_grad():
        run(traced(everything, q=1, advantages=1), torch.randn(12), torch.randn(12), torch.randn(12))
        run(traced(no_gradient), p)
    assert p.tolist() == [0, 1, 2, 3, 4]
