"""Every refusal of pbq is one of these; the CLI prints its message and exits with its code."""

from __future__ import annotations


class PbqError(Exception):
    """Base class. The message says what is wrong, where, and the way out."""

    exit_code = 1


class UsageError(PbqError):
    """An option, or a combination of options, that cannot be met."""

    exit_code = 2


class ModelError(PbqError):
    """A model that is missing, unreadable or of an unsupported kind."""

    exit_code = 3


class DataError(PbqError):
    """Calibration or evaluation data that is missing, too short, or behind an unreachable hub."""

    exit_code = 4


class ResourceError(PbqError):
    """Not enough memory or disk."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """torch, which is not imported here, has an error of its own on GPUs and none on CPUs."""
    torch_says = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or torch_says


class NumericalError(PbqError):
    """Non-finite activations, or a Hessian that stays singular."""

    exit_code = 6
