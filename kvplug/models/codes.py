"""Token codes: ±1 vectors of 64 numbers that are nearly orthogonal, from a formula.

Token c = 64 a + b has the code (-1)^Tr(a x^3 + b x), x running over the 64 elements of GF(2^6): the
dual of the two-error-correcting BCH code. Any two of the 4,096 codes overlap by at most 1/4.
"""

from __future__ import annotations

import torch

WIDTH = 64
COUNT = 4096

# Coordinates of the code that a KV head of the matching layer compares, 18 for each of its four
# lags. On each of these sets any two codes still differ in at least `SUBCODE_DISTANCE` places (the
# best possible for 4,096 codes is 4). Found by random exchange.
SUBCODES = (
    (60, 43, 51, 53, 47, 29, 33, 37, 59, 3, 36, 62, 40, 45, 9, 10, 32, 16),
    (26, 8, 42, 39, 57, 38, 25, 49, 56, 44, 48, 17, 12, 15, 58, 1, 22, 11),
    (55, 46, 13, 7, 5, 27, 28, 19, 6, 31, 20, 14, 2, 50, 23, 24, 34, 30),
    (35, 29, 10, 32, 46, 14, 37, 56, 39, 2, 47, 17, 43, 23, 57, 45, 22, 27),
)
SUBCODE_DISTANCE = 3

_MODULUS = 0b1000011  # x^6 + x + 1


def _multiply(a: int, b: int) -> int:
    """The product in GF(2^6)."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a & WIDTH:
            a ^= _MODULUS
        b >>= 1
    return product


def _trace(x: int) -> int:
    """The trace from GF(2^6) to GF(2): x + x^2 + x^4 + ... + x^32."""
    total = 0
    for _ in range(6):
        total ^= x
        x = _multiply(x, x)
    return total


def token_codes(count: int) -> torch.Tensor:
    """The codes of tokens 0 to `count` - 1.

    Returns:
        `[count, 64]` float32 of ±1.
    """
    if count > COUNT:
        raise ValueError(f"{count} tokens, but there are only {COUNT} codes")
    # Tr is linear, so a code is the sum of those of its index's twelve bits.
    elements = range(WIDTH)
    cubes = [_multiply(x, _multiply(x, x)) for x in elements]
    rows = [
        [_trace(_multiply(1 << bit, x)) for x in points]
        for points in (elements, cubes)
        for bit in range(6)
    ]
    bits = (torch.arange(count)[:, None] >> torch.arange(12)) & 1  # [count, 12]
    parity = (bits @ torch.tensor(rows)) & 1  # [count, 64]
    return (1 - 2 * parity).float()
