"""What a client's own loss may compute with: the allow-list of operators.

A name is looked up in these tables and nowhere else, so a graph reaches no attribute and no function but these. Nothing
here is random, works in place, reads memory that it has not written, or makes Python values of a tensor's elements: no
size depends on more than a datum's shapes, and the number of true elements of its masks.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from tuft.engine.custom_bounds import (
    arithmetic,
    broadcast,
    chosen,
    expanded,
    filled,
    indexed,
    largest,
    matrix_product,
    new,
    numbers,
    outer,
    padded,
    pairs,
    pieces,
    repeated,
    repeated_each,
    selected,
    spaced,
    stepped,
    together,
    viewed,
)

Bound = Callable[..., int]
MAX_INT = 2**63


@dataclass(frozen=True, slots=True)
class Operator:
    """``bound`` tells from the arguments how many elements the result has at most. ``most_args``: how many may be given
    by position."""

    function: Callable[..., Any]
    bound: Bound
    most_args: int


def _power(base: Any, exponent: Any) -> Any:
    """Of integers, none that would fill the memory before its size is known."""
    if type(base) is type(exponent) is int and abs(base) > 1 and exponent >= MAX_INT.bit_length():
        raise OverflowError(f"{base} to the power of {exponent} is too large")
    return base**exponent


def _attribute(value: Any, name: Any) -> Any:
    known = _TENSOR_ATTRIBUTES if isinstance(value, Tensor) else _RESULT_ATTRIBUTES if isinstance(value, tuple) else ()
    if name not in known:
        raise AttributeError(f"a {type(value).__name__} has no {name}")
    return getattr(value, name)


_TENSOR_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "T", "mT")
_RESULT_ATTRIBUTES = ("values", "indices")
ATTRIBUTES = _TENSOR_ATTRIBUTES + _RESULT_ATTRIBUTES
"""That ``getattr`` may read, of a tensor or of what ``max``, ``sort`` and the like return."""


_NAMES: Mapping[Bound, str] = {
    broadcast: """
        abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
        bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh cosine_similarity digamma div divide eq erf
        erfc erfinv exp exp2 expm1 fix floor floor_divide fmax fmin fmod frac ge greater greater_equal gt hypot isclose
        isfinite isinf isnan le lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and
        logical_not logical_or logical_xor logit lt masked_fill maximum minimum mul multiply nan_to_num ne neg
        negative not_equal positive pow reciprocal relu remainder round rsqrt rsub sgn sigmoid sign sin sinc sinh sqrt
        square sub subtract tan tanh true_divide trunc xlogy""",
    largest: """
        all amax amin any argmax argmin argsort bfloat16 bool clone contiguous count_nonzero cpu cumprod cumsum detach
        diagonal dim double expand_as flatten flip float full_like gather half index_add int log_softmax logcumsumexp
        logsumexp long masked_select mean moveaxis movedim nanmean nansum narrow ndimension nelement norm numel
        ones_like permute prod ravel reshape reshape_as roll scatter scatter_add select short size softmax squeeze std
        sum swapaxes swapdims t take to trace transpose tril triu type type_as unflatten unsqueeze var view_as
        zeros_like""",
    pairs: "aminmax cummax cummin max median min nanmedian sort std_mean topk var_mean",
    chosen: "where",
    together: "cat concat concatenate hstack vstack stack",
    pieces: "chunk split unbind",
    filled: "zeros ones full",
    new: "new_zeros new_ones new_full",
    repeated: "repeat tile",
    expanded: "expand broadcast_to",
    repeated_each: "repeat_interleave",
    stepped: "arange",
    spaced: "linspace",
    viewed: "view",
    outer: "outer ger",
    matrix_product: "matmul mm bmm mv dot",
    selected: "index_select",
}
_IN_PYTHON = {"norm", "split"}
_FUNCTIONAL: Mapping[Bound, str] = {
    broadcast: """
        relu relu6 silu elu selu celu leaky_relu gelu mish hardtanh hardsigmoid hardswish sigmoid tanh softplus softsign
        tanhshrink threshold _threshold logsigmoid huber_loss smooth_l1_loss mse_loss l1_loss kl_div
        binary_cross_entropy binary_cross_entropy_with_logits poisson_nll_loss gaussian_nll_loss margin_ranking_loss
        cosine_similarity""",
    largest: "softmax log_softmax softmin normalize nll_loss cross_entropy",
    padded: "pad",
}
_SPECIAL = "expit logit xlogy xlog1py entr log1p expm1 erf erfc erfinv exp2 ndtr log_ndtr gammaln digamma psi sinc"
_MATH = """acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh degrees erf erfc exp exp2 expm1 fabs floor fmod
    hypot isfinite isinf isnan log log10 log1p log2 pow radians sin sinh sqrt tan tanh trunc"""
_OPERATORS = "abs add and_ eq floordiv ge gt inv invert le lt mod mul ne neg or_ pos sub truediv xor"


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "inplace": (False,),
    "out": (None,),
    "requires_grad": (False,),
    "size_average": (None,),
    "reduce": (None,),
    "_stacklevel": tuple(range(8)),
    "pin_memory": (False,),
}
"""Keywords that torch.fx records and that may only say what is the case anyway. They are left out."""
_MANY = 64


def _operator(function: Callable[..., Any], bound: Bound) -> Operator:
    """As many positions as come before ``inplace`` or ``out``; torch's own built-in functions have these by name alone,
    and no signature."""
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:
        names = []
    return Operator(function, bound, min((names.index(name) for name in names if name in NEUTRAL), default=_MANY))


def _methods() -> Iterator[tuple[str, Operator]]:
    for bound, names in _NAMES.items():
        for name in names.split():
            if hasattr(Tensor, name):
                yield name, _operator(getattr(Tensor, name), bound)


def _functions() -> Iterator[tuple[str, Operator]]:
    for bound, names in _NAMES.items():
        for name in names.split():
            if callable(getattr(torch, name, None)):  # torch.float is a dtype, torch.cpu a module
                yield f"torch.{name}", _operator(getattr(torch, name), bound)
                if name in _IN_PYTHON:  # torch.fx names them by their module
                    yield f"torch.functional.{name}", _operator(getattr(torch, name), bound)
    for bound, names in _FUNCTIONAL.items():
        for name in names.split():
            yield f"torch.nn.functional.{name}", _operator(getattr(torch.nn.functional, name), bound)
    for name, function in (("softplus", "softplus"), ("log_sigmoid", "logsigmoid"), ("gelu", "gelu")):
        yield f"torch._C._nn.{name}", _operator(getattr(torch.nn.functional, function), broadcast)
    for name in _SPECIAL.split():
        for prefix in ("torch.special.", "torch._C._special.special_"):
            yield prefix + name, _operator(getattr(torch.special, name), broadcast)
    for prefix in ("torch.linalg.", "torch._C._linalg.linalg_"):
        yield f"{prefix}vector_norm", _operator(torch.linalg.vector_norm, largest)
    for name in _MATH.split():
        yield f"math.{name}", _operator(getattr(math, name), numbers)
    for name in _OPERATORS.split():
        yield f"operator.{name}", _operator(getattr(operator, name), arithmetic)
    yield "operator.pow", _operator(_power, arithmetic)
    yield "operator.matmul", _operator(operator.matmul, matrix_product)
    yield "operator.getitem", _operator(operator.getitem, indexed)
    yield "getattr", _operator(_attribute, lambda value, _: largest(value))


METHODS: Mapping[str, Operator] = dict(_methods())
"""Methods of tensors, which is what their first argument must be."""
FUNCTIONS: Mapping[str, Operator] = dict(_functions())
"""By the names that torch.fx gives them."""
_KEYWORDS = """
    alpha base beta chunks condition copy correction delta descending device diagonal dim dim0 dim1 dims dtype end
    end_dim eps exponent fill_value full index input input1 input2 keepdim keepdims largest layout log_input
    log_target margin mask max max_val memory_format min min_val mode n nan neginf negative_slope non_blocking offset
    ord other p pad posinf pos_weight reduction repeats rounding_mode shifts size sorted split_size src stable start
    start_dim step steps tensor1 tensor2 tensors threshold target unbiased value var weight x1 x2"""
KEYWORDS = frozenset(_KEYWORDS.split())
"""Keywords that may be given, beside those of ``NEUTRAL``."""
TEXTS = frozenset({"none", "mean", "sum", "batchmean", "trunc", "floor", "constant", "cpu"})
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
