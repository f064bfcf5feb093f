# SPDX-License-Identifier: Apache-2.0
"""Compiled loops that lay weights out as vLLM's x86 kernels read them.

vLLM's own (``convert_weight_packed``, ``convert_weight_packed_scale_zp``) take four times as long
and more, and fresh memory. Numba, which vLLM requires, compiles these for the CPU when they are
first called and keeps the result for the next process. They run without Python's lock. What int4
layouts are says :mod:`.int4_blocks`.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"
# Numba has no types, and what it compiles needs none.

from contextlib import suppress

import numba
import numpy as np
from numba.core.caching import FunctionCache

from vllm_mixprec.patches import numba_imported

numba_imported.apply()  # workers are still to start in this process

_WORD, _PAIR = np.uint32, np.uint64
# The even codes of a word's eight, the even bytes of its four, and its lower half.
_EVEN_CODES, _EVEN_BYTES, _LOWER = _WORD(0x0F0F0F0F), _WORD(0x00FF00FF), _WORD(0xFFFF)
_FOUR, _EIGHT, _SIXTEEN = _WORD(4), _WORD(8), _WORD(16)
_PADDING = 16  # units; rows a power of two apart would lie in the same few lines of the cache


class _Cache(FunctionCache):
    """Numba's, of which no failure matters: a disk that is full, a file that was cut short."""

    def load_overload(self, *given):
        with suppress(Exception):
            return super().load_overload(*given)
        return None

    def save_overload(self, *given):
        with suppress(Exception):
            super().save_overload(*given)


def _compiled(function):
    loop = numba.njit(nogil=True)(function)
    with suppress(RuntimeError):  # neither the package's directory nor the user's can be written to
        loop._cache = _Cache(function)
    return loop


_inlined = numba.njit(inline="always")


@_compiled
def turn_blocks(units, block_rows):
    """Transpose each few rows of a matrix where they are, the last block whatever rows are left.

    Args:
        units: unsigned (N, K / 2), two neighbouring weights each: of bfloat16 uint32, of FP8
            uint16. Written: blocks of (K / 2, block_rows).
        block_rows: rows of a block.
    """
    n, columns = units.shape
    stored = np.empty((block_rows, columns + _PADDING), units.dtype)
    written = units.reshape(n * columns)
    for first in range(0, n, block_rows):
        rows = min(block_rows, n - first)
        for row in range(rows):
            for column in range(columns):
                stored[row, column] = units[first + row, column]
        block = written[first * columns : (first + rows) * columns]
        for column in range(columns):
            for row in range(rows):
                block[column * rows + row] = stored[row, column]


@_inlined
def _spread(half):
    """Spread the four codes of a word's lower half, its upper one zero, to its four bytes."""
    half = (half | (half << _EIGHT)) & _EVEN_BYTES
    return (half | (half << _FOUR)) & _EVEN_CODES


@_inlined
def _add_bytes(word):
    """Return the sums of a word's even and odd bytes' pairs, 16 bits each."""
    return (word & _EVEN_BYTES) + ((word >> _EIGHT) & _EVEN_BYTES)


@_compiled
def block_gptq(words, zeros, block_k, out):
    """Lay out the GPTQ weight of one linear or expert.

    Args:
        words: uint32 (K / 8, N): eight input features a word, the first lowest.
        zeros: int8 (groups, N), zero points as they are subtracted.
        block_k: input features of a block, at most 128.
        out: uint64 (N / 32, K / block_k, 2 * block_k + 16), written.
    """
    rows, n, blocks = block_k // 8, words.shape[1], out.shape[1]
    # Codes of the four input features of a word's lower half and of its upper one, a byte each.
    lower, upper = np.empty(n, _WORD), np.empty(n, _WORD)
    sums = np.empty((2, n), _WORD)  # of up to 16 codes a byte
    lower_pairs, upper_pairs, sum_pairs = (
        lower.view(_PAIR),
        upper.view(_PAIR),
        sums[0].view(_PAIR),
    )
    for block in range(blocks):
        sums[:] = 0
        for row in range(rows):
            some = words[block * rows + row]
            for feature in range(n):  # as long as it can be: short loops are not vectorised
                low, high = _spread(some[feature] & _LOWER), _spread(some[feature] >> _SIXTEEN)
                sums[0, feature] += low
                sums[1, feature] += high
                lower[feature], upper[feature] = low, high
            for run in range(n // 16):
                codes = out[run // 2, block]
                place = 16 * row + 4 * (run % 2)
                for pair in range(4):
                    at = 8 * run + pair
                    codes[place + pair] = lower_pairs[at] | (lower_pairs[at + 4] << _PAIR(4))
                    codes[place + 8 + pair] = upper_pairs[at] | (upper_pairs[at + 4] << _PAIR(4))
        group = block * len(zeros) // blocks
        for feature in range(n):
            halves = _add_bytes(sums[0, feature]) + _add_bytes(sums[1, feature])
            total = np.int32((halves & _LOWER) + (halves >> _SIXTEEN))
            sums[0, feature] = _WORD(total - np.int32(block_k) * np.int32(zeros[group, feature]))
        for tile in range(n // 32):
            for pair in range(16):
                out[tile, block, 16 * rows + pair] = sum_pairs[16 * tile + pair]


@_compiled
def block_awq(words, zeros, block_k, out):
    """Lay out the AWQ weight of one linear or expert.

    Args:
        words: uint32 (K, N / 8): eight output features a word, in AWQ's order.
        zeros: int8 (groups, N), zero points as they are subtracted.
        block_k: input features of a block, at most 128.
        out: uint64 (N / 32, K / block_k, 2 * block_k + 16), written.
    """
    out_words = out.view(_WORD)
    runs, blocks = words.shape[1] // 2, out.shape[1]
    # Of 16 output features' codes in even places of their words and in odd ones: of the first
    # eight features and of the others, in even bytes and in odd ones, 16 bits each.
    sums = np.empty((runs, 2, 2, 2), _WORD)
    for block in range(blocks):
        sums[:] = 0
        for quad in range(block_k // 4):
            row = block * block_k + 4 * quad
            for run in range(runs):
                codes = out_words[run // 2, block]
                for odd in range(2):
                    shift, place = _WORD(4 * odd), 16 * quad + 8 * (run % 2) + 2 * odd
                    # A byte for each of four features; output feature j below j + 8.
                    k0 = _join(words, row, run, shift)
                    k1 = _join(words, row + 1, run, shift)
                    k2 = _join(words, row + 2, run, shift)
                    k3 = _join(words, row + 3, run, shift)
                    for upper in range(2):
                        by = _WORD(4 * upper)
                        four = ((k0 >> by) & _EVEN_CODES) + ((k1 >> by) & _EVEN_CODES)
                        four += ((k2 >> by) & _EVEN_CODES) + ((k3 >> by) & _EVEN_CODES)
                        sums[run, odd, upper, 0] += four & _EVEN_BYTES
                        sums[run, odd, upper, 1] += (four >> _EIGHT) & _EVEN_BYTES
                    # Four by four bytes are transposed: input features k to k + 3 of each.
                    even01 = (k0 & _EVEN_BYTES) | ((k1 & _EVEN_BYTES) << _EIGHT)
                    even23 = (k2 & _EVEN_BYTES) | ((k3 & _EVEN_BYTES) << _EIGHT)
                    odd01 = ((k0 >> _EIGHT) & _EVEN_BYTES) | (k1 & ~_EVEN_BYTES)
                    odd23 = ((k2 >> _EIGHT) & _EVEN_BYTES) | (k3 & ~_EVEN_BYTES)
                    codes[place] = (even01 & _LOWER) | (even23 << _SIXTEEN)
                    codes[place + 1] = (even01 >> _SIXTEEN) | (even23 & ~_LOWER)
                    codes[place + 4] = (odd01 & _LOWER) | (odd23 << _SIXTEEN)
                    codes[place + 5] = (odd01 >> _SIXTEEN) | (odd23 & ~_LOWER)
        group = block * len(zeros) // blocks
        for run in range(runs):
            less = out_words[run // 2, block, 4 * block_k + 16 * (run % 2) :]
            for odd in range(2):
                for upper in range(2):
                    for byte in range(4):
                        # The bytes of a word are its output features 0, 4, 1, 5 or 2, 6, 3, 7.
                        feature = 8 * upper + 2 * odd + 4 * (byte % 2) + byte // 2
                        total = (sums[run, odd, upper, byte % 2] >> _WORD(byte // 2 * 16)) & _LOWER
                        zero = np.int32(zeros[group, 16 * run + feature])
                        less[feature] = _WORD(np.int32(total) - np.int32(block_k) * zero)


@_inlined
def _join(words, row, run, shift):
    """Return a byte for each of four output features and of those eight further on."""
    first, second = words[row, 2 * run], words[row, 2 * run + 1]
    return ((first >> shift) & _EVEN_CODES) | (((second >> shift) & _EVEN_CODES) << _FOUR)
