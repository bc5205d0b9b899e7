"""Student's t, for intervals of few numbers, by its finite sums: no library of statistics."""

import math


def t_p(t: float, df: int) -> float:
    """Two-sided p of Student's t with `df` degrees of freedom, by the finite sums for whole ones (Abramowitz and Stegun
    26.7.3 and 26.7.4)."""
    theta = math.atan(abs(t) / math.sqrt(df))
    odd = df % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for i in range(df // 2):
        total += term
        term *= (2 * i + 1 + odd) / (2 * i + 2 + odd) * math.cos(theta) ** 2
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + inside)
    return max(0.0, 1 - inside)


def t_quantile(df: int, p: float = 0.05) -> float:
    """The t whose two-sided p is `p`."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        if t_p(middle, df) > p:
            low = middle
        else:
            high = middle
    return high
