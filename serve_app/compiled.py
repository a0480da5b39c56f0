"""Loops over the numbers of many sessions, compiled: they take about as long as one call of numpy, however many.

Between two steps a processor is at other things, so that the code of each numpy call comes out of memory again.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function of arrays and numbers at its first call, and keep that on disk.

    Indices are not checked, nor are divisors.
    """
    return cast(F, numba.njit(cache=True, error_model="numpy")(function))


def _copy_bytes(_: Any, target: Any, start: Any, source: Any, begin: Any, count: Any) -> Any:
    """target[start : start + count] = source[begin : begin + count], of arrays of uint8, within compiled functions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, of = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        _, start, _, begin, count = args
        copy: Any = cgutils.raw_memcpy
        copy(builder, builder.gep(to, [start]), builder.gep(of, [begin]), count, 1)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), generate


copy_bytes: Any = intrinsic(_copy_bytes)


def array(values: np.ndarray) -> np.ndarray:
    """As int64 [...] in C order, as compiled functions take them; a copy only where they are not."""
    return np.ascontiguousarray(values, np.int64)


def own_array(values: np.ndarray) -> np.ndarray:
    """The same, aligned and not read-only, as what lies in a message may be: functions are compiled for that alone."""
    found = array(values)
    return found if found.flags.behaved else found.copy()
