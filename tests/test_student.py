"""Student's t by the tables of others and by its density; and as many degrees of freedom as somebody has."""

import math

import numpy as np
import pytest

from student import t_p, t_quantile


@pytest.mark.parametrize("df, quantile", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646),
                                          (10, 2.2281), (30, 2.0423), (120, 1.9799)])  # fmt: skip
def test_the_quantiles_of_students_t(df, quantile):
    assert t_quantile(df) == pytest.approx(quantile, abs=1e-4)
    assert t_p(-quantile, df) == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize("t, df, p", [(2.0, 4, 0.1161), (1.0, 1, 0.5), (2.0, 1, 0.2952), (3.0, 2, 0.0955),
                                      (2.5, 5, 0.0545), (0.0, 3, 1.0), (8.61, 4, 0.001)])  # fmt: skip
def test_the_p_of_students_t(t, df, p):
    assert t_p(t, df) == pytest.approx(p, abs=5e-5)


def test_p_is_the_integral_of_the_density():
    x = np.linspace(0, 3, 300001)
    for df in range(1, 13):
        scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        inside = 2 * np.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)
        assert t_p(3.0, df) == pytest.approx(1 - inside, abs=1e-8)
