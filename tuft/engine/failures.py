"""What went wrong in a computation, told to the one who asked for it."""

from __future__ import annotations

import sys
import traceback

import torch

from tuft.errors import EngineError, TuftError, UserError


def engine_error(error: Exception, doing: str) -> TuftError:
    """``error`` as a TuftError. One that nobody raised on purpose also goes to stderr, with its traceback."""
    if isinstance(error, TuftError):
        return error
    traceback.print_exception(error, file=sys.stderr)
    if _is_out_of_memory(error):
        return EngineError(
            f"{doing}: the engine is out of memory; lower engine.micro_batch_tokens, engine.kv_cache_tokens or "
            "engine.max_decode_rows, or the number of adapters loaded at once"
        )
    return EngineError(f"{doing}: {type(error).__name__}: {error}")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # what torch says on a CPU


def cancelled() -> UserError:
    return UserError("cancelled: its client asked for that")
