"""Statistics of success rates: an interval, the difference of two models, the chance that one of several samples is
right."""

import math
from statistics import fmean, stdev


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval (low, high) of a rate; z = 1.96 gives 95 %. (Wilson 1927.)

    Unlike p +- z * sqrt(p(1-p)/n) it holds for small n and for rates near 0 and 1. With n = 0 nothing is known:
    (0, 1). `successes` may be a fraction: a mean of several samples per problem, times the number of problems.
    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z**2 / (2 * n)
    half_width = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # With no success the low end is exactly 0, with no failure the high end exactly 1: floats only come near.
    low = (centre - half_width) / scale if successes > 0 else 0.0
    high = (centre + half_width) / scale if successes < n else 1.0
    return low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that k of n samples, c of them correct, include a correct one (Chen et al. 2021, eq. 1)."""
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def powers_of_two(n: int) -> list[int]:
    """2, 4, 8, ... below n, and n: the k of pass@k that n samples are described by."""
    return [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n]


def paired_difference(a: list[float], b: list[float], z: float = 1.96) -> tuple[float, float, float]:
    """Mean of a - b over the same problems, and its confidence interval: (mean, low, high); z = 1.96 gives 95 %.

    a, b: one success rate per problem, in the same order. The interval is the normal one of a mean of differences: what
    makes a problem hard for both models cancels. It says nothing about other training seeds.
    Raises ValueError unless both have one length of two or more.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"paired_difference needs two or more pairs, got {len(a)} and {len(b)} values")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean, half_width = fmean(differences), z * stdev(differences) / math.sqrt(len(a))
    return mean, mean - half_width, mean + half_width


def pack_outcomes(right: list[bool]) -> str:
    """Outcomes of n problems as hexadecimal digits, four problems a digit, so that a log can hold them."""
    bits = "".join("1" if outcome else "0" for outcome in right)
    return "".join(f"{int(bits[i : i + 4].ljust(4, '0'), 2):x}" for i in range(0, len(bits), 4))


def unpack_outcomes(digits: str, n: int) -> list[bool]:
    """What pack_outcomes was given."""
    return [bit == "1" for digit in digits for bit in f"{int(digit, 16):04b}"][:n]


def paired_z(before: list[bool], after: list[bool]) -> float:
    """How many standard errors the share of right outcomes rose on the same problems (McNemar 1947).

    (gained - lost) / sqrt(gained + lost): problems with the same outcome say nothing about a change. 0 if none changed.
    """
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    return (gained - lost) / math.sqrt(max(1, gained + lost))


def unpaired_z(p: float, n: int, q: float, m: int) -> float:
    """How many standard errors the rate q of m trials is above the rate p of n other ones (pooled two-sample test)."""
    pooled = (p * n + q * m) / (n + m)
    return (q - p) / math.sqrt(max(pooled * (1 - pooled), 1 / (n + m)) * (1 / n + 1 / m))
