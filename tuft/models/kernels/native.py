"""What CPU kernels are made of: how one is declared, how it finds its arrays, and how it runs on torch's threads.

A kernel is a function of one pointer to its arguments, 64-bit integers: sizes, addresses of arrays, floats as the bits
of a double. It runs on every thread of a team, and takes with ``share`` the part of the work that is its own. The team
is that of torch's own OpenMP library: a second pool of threads on the same cores would cost every operator its speed.

Rules for kernels: what one row (or head, or item) gets is computed by one thread, in an order that depends on nothing
but the row's own size; so bits depend neither on neighbours nor on the number of threads. bf16 arrays are ``uint16``.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir

_F = TypeVar("_F", bound=Callable[..., Any])

SERIAL_ELEMENTS = 16_384
"""Less work than this is done by the caller alone: waking the team would take as long (about 5 us)."""


def _openmp() -> ctypes.CDLL:
    """The GNU OpenMP library that torch has loaded. Raises OSError if there is none."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    loaded = {line.split()[-1] for line in lines if "libgomp" in line}
    of_torch = [path for path in sorted(loaded) if Path(path).is_relative_to(Path(torch.__file__).parents[1])]
    if not loaded:
        raise OSError("torch computes with another OpenMP library than GNU's")
    return ctypes.CDLL((of_torch or sorted(loaded))[0])


def _address(library: ctypes.CDLL, name: str) -> int:
    return cast(int, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)


_library = _openmp()
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    llvm.add_symbol(_name, _address(_library, _name))  # before numba loads code that calls them
llvm.add_symbol("sched_yield", _address(ctypes.CDLL(None), "sched_yield"))
_run_team = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
    _address(_library, "GOMP_parallel")
)

from numba import carray, cfunc, njit, types  # noqa: E402 (after the symbols)
from numba.extending import intrinsic  # noqa: E402

_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
HAS_BF16 = bool(llvm.get_host_cpu_features().get("avx512bf16", False))
_REORDERED = {"reassoc", "contract", "nsz", "arcp"}  # sums may be vectorised; NaN and infinity keep their meaning


class Kernel:
    """A compiled kernel. ``kernel(work, *args)`` runs it on torch's threads, or on the caller's alone if ``work`` (a
    number of elements) is little."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._alone = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address)  # short: the GIL is not worth releasing

    def __call__(self, work: int, *args: int) -> None:
        packed = (ctypes.c_int64 * len(args))(*args)
        num_threads = torch.get_num_threads()
        if work < SERIAL_ELEMENTS or num_threads == 1:
            self._alone(packed)
        else:
            _run_team(self._address, packed, num_threads, 0)


def kernel(function: Callable[[Any], None]) -> Kernel:
    """Compile ``function(p)``, or load it from numba's cache (``NUMBA_CACHE_DIR``)."""
    signature = types.void(types.CPointer(types.int64))
    return Kernel(cfunc(signature, cache=True, fastmath=_REORDERED, error_model="numpy")(function).address)


def inlined(function: _F) -> _F:
    """A function that kernels call; its sums may be reordered as theirs."""
    return cast(_F, njit(forceinline=True, fastmath=_REORDERED, error_model="numpy")(function))


def exactly(function: _F) -> _F:
    """As ``inlined``, but every operation is carried out as written."""
    return cast(_F, njit(forceinline=True, fastmath=False, error_model="numpy")(function))


def double_bits(value: float) -> int:
    """A float as an argument; ``as_double`` reads it."""
    return cast(int, struct.unpack("q", struct.pack("d", value))[0])


# --- what kernels call ------------------------------------------------------------------------------------------------


@intrinsic
def _pointer(context: Any, address: Any, dtype: Any) -> Any:  # noqa: ARG001
    signature = types.CPointer(dtype.dtype)(address, dtype)
    return signature, lambda c, b, s, args: b.inttoptr(args[0], c.get_value_type(s.return_type))


@intrinsic
def as_double(context: Any, bits: Any) -> Any:  # noqa: ARG001
    """The float that ``double_bits`` made into an argument."""
    return types.float64(types.int64), lambda c, b, s, args: b.bitcast(args[0], ir.DoubleType())  # noqa: ARG005


@intrinsic
def as_float32(context: Any, bits: Any) -> Any:  # noqa: ARG001
    """The float32 whose bits are the lower half of a whole number."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        return b.bitcast(b.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), generate


@inlined
def arguments(p: Any) -> Any:
    """The kernel's arguments, by number."""
    return carray(p, (48,))


@inlined
def is_bf16(p: Any) -> Any:
    """Whether the first argument, the size of an element in bytes, is that of bf16 and not of float32."""
    return arguments(p)[0] == 2


@inlined
def array(address: int, size: int, dtype: Any) -> Any:
    """The contiguous one-dimensional array at ``address``."""
    return carray(_pointer(address, dtype), (size,))


@intrinsic
def item_bytes(context: Any, dtype: Any) -> Any:  # noqa: ARG001
    return types.int64(dtype), lambda c, b, s, args: ir.Constant(ir.IntType(64), dtype.dtype.bitwidth // 8)  # noqa: ARG005


@inlined
def line(address: int, index: int, width: int, dtype: Any) -> Any:
    """Row ``index`` of the matrix at ``address``, whose rows of ``width`` follow each other."""
    return array(address + index * width * item_bytes(dtype), width, dtype)


@inlined
def share(num_items: int) -> tuple[int, int]:
    """``first, stop``: the items that are this thread's."""
    thread, num_threads = _thread_num(), _num_threads()
    return num_items * thread // num_threads, num_items * (thread + 1) // num_threads


@inlined
def turn() -> tuple[int, int]:
    """This thread's number and how many there are: ``first, step`` of its items where these are taken in turn, since
    their cost differs."""
    return _thread_num(), _num_threads()


@intrinsic
def _arrive(context: Any, counter: Any) -> Any:  # noqa: ARG001
    """Add 1 to the 64-bit number at ``counter``, for all threads to see."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        i64 = ir.IntType(64)
        b.atomic_rmw("add", b.inttoptr(args[0], i64.as_pointer()), ir.Constant(i64, 1), "acq_rel")
        return c.get_dummy_value()

    return types.void(counter), generate


@intrinsic
def _arrivals(context: Any, counter: Any) -> Any:  # noqa: ARG001
    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        return b.load_atomic(b.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.int64(counter), generate


_SPINS = 20_000
"""Looks at a counter before the core is offered to another process: about 10 us."""


@inlined
def wait_for_all(counter: int, target: int) -> int:
    """A point that no thread passes before all have reached it. ``counter`` is the address of a number that began at 0,
    ``target`` what it will be when all have come: 0 at first, then what the last call returned."""
    num_threads = _num_threads()
    target += num_threads
    if num_threads > 1:
        _arrive(counter)
        spins = 0
        while _arrivals(counter) < target:
            spins += 1
            if spins % _SPINS == 0:
                _sched_yield()
    return target


def _widened(b: Any, bits: Any) -> Any:
    i32 = ir.IntType(32)
    return b.bitcast(b.shl(b.zext(bits, i32), ir.Constant(i32, 16)), ir.FloatType())


class BFloat(ir.Type):
    """LLVM's bf16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


def bf16_bits(b: Any, value: Any) -> Any:
    """LLVM code that rounds a float, or a vector of them, to nearest even as torch does; NaN stays NaN. Numbers
    below the smallest normal one may become 0."""

    def like_value(element: Any) -> Any:
        return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element

    def constant(number: int) -> Any:
        bits_type = like_value(ir.IntType(32))
        return bits_type([number] * value.type.count if isinstance(value.type, ir.VectorType) else number)

    half_type = like_value(ir.IntType(16))
    if HAS_BF16:  # one instruction; elsewhere LLVM might call a function that is not there
        return b.bitcast(b.fptrunc(value, like_value(BFloat())), half_type)
    bits = b.bitcast(value, like_value(ir.IntType(32)))
    is_odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    nearest = b.lshr(b.add(b.add(bits, constant(0x7FFF)), is_odd), constant(16))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(is_nan, constant(0x7FC0), nearest), half_type)


@intrinsic
def loaded(context: Any, element: Any) -> Any:  # noqa: ARG001
    """An array's element as float32, whichever of the two dtypes the array has."""
    if element == types.uint16:
        return types.float32(types.uint16), lambda c, b, s, args: _widened(b, args[0])  # noqa: ARG005
    return types.float32(types.float32), lambda c, b, s, args: args[0]  # noqa: ARG005


@intrinsic
def stored(context: Any, value: Any, dtype: Any) -> Any:  # noqa: ARG001
    """A float32 number as an element of an array of ``dtype``."""
    if dtype.dtype == types.uint16:
        return types.uint16(types.float32, dtype), lambda c, b, s, args: bf16_bits(b, args[0])  # noqa: ARG005
    return types.float32(types.float32, dtype), lambda c, b, s, args: args[0]  # noqa: ARG005


@intrinsic
def _floor(context: Any, x: Any) -> Any:  # noqa: ARG001
    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        return b.call(b.module.declare_intrinsic("llvm.floor", [ir.FloatType()]), args)

    return types.float32(types.float32), generate


@intrinsic
def _fma(context: Any, x: Any, y: Any, z: Any) -> Any:  # noqa: ARG001
    """x * y + z, rounded once."""
    f32 = types.float32
    return f32(f32, f32, f32), lambda c, b, s, args: b.fma(*args)  # noqa: ARG005


@intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:  # noqa: ARG001
    """2 to a whole number between -126 and 127, given as float32."""

    def generate(c: Any, b: Any, s: Any, args: Any) -> Any:  # noqa: ARG001
        i32 = ir.IntType(32)
        whole = b.fptosi(args[0], i32)
        return b.bitcast(b.shl(b.add(whole, ir.Constant(i32, 127)), ir.Constant(i32, 23)), ir.FloatType())

    return types.float32(types.float32), generate


_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_LOWEST, _HIGHEST = -87.33654, 88.37626


@exactly
def exp(x: Any) -> Any:
    """e to the x, float32, within one unit in the last place; 0 below the smallest normal number, 2.4e38 at most; NaN
    stays NaN.

    The classic reduction: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 5 for e**r. Written out because
    LLVM vectorises arithmetic but not calls.
    """
    f32 = np.float32
    capped = f32(_HIGHEST) if x > f32(_HIGHEST) else x
    n = _floor(_fma(max(f32(_LOWEST), capped), f32(_LOG2_E), f32(0.5)))
    r = _fma(n, f32(-_LN2_LOW), _fma(n, f32(-_LN2_HIGH), capped))
    p = _fma(f32(1.9875691500e-4), r, f32(1.3981999507e-3))
    p = _fma(p, r, f32(8.3334519073e-3))
    p = _fma(p, r, f32(4.1665795894e-2))
    p = _fma(p, r, f32(1.6666665459e-1))
    p = _fma(p, r, f32(5.0000001201e-1))
    p = _fma(p, r * r, r) + f32(1)
    return f32(0) if x < f32(_LOWEST) else p * _power_of_two(n)
