"""Closeness of gradients of a net with ReLUs, in float32."""

import jax
import numpy as np


def assert_gradients_close(ours, wanted, typical: float = 2e-5, worst: float = 3e-2) -> None:
    """Compares trees of gradients by each array's relative error, ||a - b|| / ||b||.

    Two correct programs round differently, and where a pre-activation lies within rounding of zero
    one of them lets its gradient through and the other does not. That moves a few arrays by up to a
    percent; it cannot move half of them. So half of the errors must be within float32's rounding
    (`typical`), and none above a few percent (`worst`). A wrong axis, scale or sign moves them all.
    """
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(ours),
        jax.tree_util.tree_leaves_with_path(wanted),
        strict=True,
    )
    errors = {}
    for (path, a), (same, b) in pairs:
        assert path == same
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, path
        scale = np.linalg.norm(b)
        errors[jax.tree_util.keystr(path)] = (
            np.linalg.norm(a - b) / scale if scale else abs(a).max()
        )
    assert np.median(list(errors.values())) < typical, errors
    assert max(errors.values()) < worst, errors
