"""Writes timm_golden.npz: what timm's norms compute, for test_norms.py.

    pip install torch timm numpy && python tests/golden/make_timm_golden.py

Inputs and parameters are drawn by NumPy from a fixed seed, here and in the test, so only results
are stored, channels last: outputs, and the gradients of the sum of outputs * cotangent.
Made with timm 1.0.31 and PyTorch 2.14.1 (CPU), float64 rounded to float32.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("timm_golden.npz")
SHAPE, GROUPS = (3, 5, 4, 8), 4
PARAMETERS = {  # timm's names for ours
    "frn": {"scale": "weight", "bias": "bias", "threshold": "tau"},
    "evonorm-s0": {"scale": "weight", "bias": "bias", "v": "v"},
}


def drawn(norm: str) -> dict[str, np.ndarray]:
    """The input `x`, the cotangent `to_y` and the parameters, f64."""
    rng = np.random.default_rng(len(norm))
    arrays = {"x": rng.normal(0.3, 1, SHAPE), "to_y": rng.normal(size=SHAPE)}
    return arrays | {name: rng.normal(0.5, 0.5, SHAPE[-1:]) for name in PARAMETERS[norm]}


def computed(norm: str) -> dict[str, np.ndarray]:
    """What timm computes of `drawn`, by "norm name"."""
    import torch
    from timm.layers import EvoNorm2dS0, FilterResponseNormTlu2d

    arrays, channels = {k: torch.tensor(v) for k, v in drawn(norm).items()}, SHAPE[-1]
    module = {
        "frn": lambda: FilterResponseNormTlu2d(channels, apply_act=True, eps=1e-6),
        "evonorm-s0": lambda: EvoNorm2dS0(channels, groups=GROUPS, apply_act=True, eps=1e-5),
    }[norm]().double()
    # timm's statistics are of float32 whatever the dtype is: those of these inputs, of float64.
    torch.Tensor.float = torch.Tensor.double
    with torch.no_grad():
        for ours, theirs in PARAMETERS[norm].items():
            getattr(module, theirs).copy_(arrays[ours])
    x = arrays["x"].permute(0, 3, 1, 2).requires_grad_()
    y = module(x)
    y.backward(arrays["to_y"].permute(0, 3, 1, 2))
    results = {"y": y.detach(), "x": x.grad}
    results = {name: values.permute(0, 2, 3, 1) for name, values in results.items()}
    results |= {ours: getattr(module, theirs).grad for ours, theirs in PARAMETERS[norm].items()}
    return {f"{norm} {name}": values.numpy().astype(np.float32) for name, values in results.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **computed("frn"), **computed("evonorm-s0"))
