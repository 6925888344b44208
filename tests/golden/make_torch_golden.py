"""Writes torch_golden.npz: what PyTorch computes for the study's nets, for test_golden.py.

    pip install torch numpy && python tests/golden/make_torch_golden.py

The nets are written here a second time, from the study's own tables and in PyTorch's terms, so that
a mistake in jaxnorm/model/cnn.py cannot hide. Parameters and images are drawn by NumPy from fixed
seeds, so only results and seeds are stored. Dropout is off: its masks are each library's own.
Made with PyTorch 2.14.1 (CPU), float64 rounded to float32.

Where the input of a ReLU is within rounding of zero, or two of a pool's within rounding of each
other, two correct programs send the gradient different ways. So the images of each net are the
first that are clear of ties in every step, and the comparison need allow for none. They are few for
that reason: of ten times as many values, some are always close.
"""

import itertools
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("torch_golden.npz")
STEPS, BATCH, KEPT = 3, 4, 256
CLEAR = 5e-6
"""The distance from a tie, some ten times float32's rounding of values about 1."""
MEAN, DEVIATION = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])


def chain(names: str, *channels: int) -> dict[str, tuple[int, int]]:
    """Layers and their channels in and out: each takes what the one before it gives."""
    return dict(zip(names.split(), itertools.pairwise(channels), strict=True))


STUDY = "C1 C2 c3 C4 C5 C6 c7 C8 C9 C10 c11"
WIDE = chain(STUDY, 3, 16, 32, 8, 16, 32, 64, 8, 16, 32, 32, 10)
NARROW = chain(STUDY, 3, 4, 4, 4, 8, 16, 16, 8, 16, 16, 32, 10)
RESIDUAL = chain("C1 C2 C3 C4 C5 C6 C7", 3, 16, 16, 16, 32, 32, 32, 64) | {"c8": (128, 10)}
PAD_BATCH = dict.fromkeys(("C1", "C2", "c3", "C8", "C9", "C10"), 1)
PAD_OTHER = dict.fromkeys(("C4", "C5", "C6", "C8", "C9"), 1)
PAD_ALL = dict.fromkeys(RESIDUAL, 1) | {"c8": 0}
SIDES = {"C1": 30, "C2": 28, "C4": 14, "C5": 14, "C6": 14, "C8": 7, "C9": 7, "C10": 5}
"""Of the group and layer nets' outputs."""
NETS = {
    "original-batch": (WIDE, PAD_BATCH),
    "original-group": (WIDE, PAD_OTHER),
    "original-layer": (NARROW, PAD_OTHER),
    **{f"matched-{norm}": (WIDE, PAD_OTHER) for norm in ("batch", "group", "layer")},
    **{f"residual-{norm}": (RESIDUAL, PAD_ALL) for norm in ("batch", "group", "layer", "pixel")},
    **{f"standardized-{norm}": (RESIDUAL, PAD_ALL) for norm in ("batch", "group", "layer")},
}
"""The last three are the tuned recipe's: residual nets whose kernels are standardized."""


def normed(net: str) -> list[str]:
    """The layers with a norm: those whose convolution is 3x3."""
    return [layer for layer in NETS[net][0] if layer.startswith("C")]


def draw_parameters(net: str) -> dict[str, np.ndarray]:
    """float64 parameters in Flax's names and layouts: kernels (h, w, i, o), scales (h, w, c)."""
    channels, _ = NETS[net]
    rng = np.random.default_rng(11)
    values = {}
    for layer, (inputs, outputs) in channels.items():
        side = 1 if layer.startswith("c") else 3
        bound = (side * side * inputs) ** -0.5
        values[f"{layer}/kernel"] = rng.uniform(-bound, bound, (side, side, inputs, outputs))
        if layer in normed(net):
            shape = (SIDES[layer], SIDES[layer], outputs) if net == "original-layer" else (outputs,)
            values[f"{layer}_norm/scale"] = rng.uniform(0.5, 1.5, shape)
            values[f"{layer}_norm/bias"] = rng.uniform(-0.5, 0.5, shape)
    return {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}


def draw_batches(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[STEPS + 1, BATCH, 32, 32, 3], the last batch for evaluation, and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (STEPS + 1, BATCH, 8, 8, 3)).repeat(4, 2).repeat(4, 3)
    noisy = coarse + rng.integers(-20, 21, (*coarse.shape[:2], 32, 32, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), rng.integers(0, 10, (STEPS + 1, BATCH))


def sample(values: np.ndarray) -> np.ndarray:
    """At most KEPT values of an array, evenly spread, and then its norm."""
    flat = values.reshape(-1)
    return np.append(flat[:: -(-flat.size // KEPT)], np.linalg.norm(flat)).astype(np.float32)


def make(net: str, seed: int) -> dict[str, np.ndarray] | None:
    """Results of one net on the images of a seed, or None: they are too close to a tie."""
    import torch
    from torch import nn

    channels, padding = NETS[net]
    drawn = draw_parameters(net)

    class Standardized(nn.Conv2d):
        """Qiao et al., "Weight Standardization": mean 0 and variance 1 / fan-in of each output."""

        def forward(self, x):
            flat = self.weight.flatten(1)
            centred = flat - flat.mean(1, keepdim=True)
            variance = flat.var(1, correction=0, keepdim=True)
            kernel = centred / torch.sqrt(flat.shape[1] * variance + 1e-5)
            return nn.functional.conv2d(x, kernel.view_as(self.weight), padding=self.padding)

    class TorchNet(nn.Module):
        def __init__(self):
            super().__init__()
            conv = Standardized if net.startswith("standardized") else nn.Conv2d
            self.convs, self.norms, self.nearest = nn.ModuleDict(), nn.ModuleDict(), 1.0
            for layer, io in channels.items():
                pad = padding.get(layer, 0)
                side = 1 if layer.startswith("c") else 3
                self.convs[layer] = conv(*io, side, padding=pad, bias=False)
                if layer in normed(net):
                    self.norms[layer] = self.norm(layer, io[1])

        def norm(self, layer, width):
            kind = net.partition("-")[2]
            if kind == "batch":
                return nn.BatchNorm2d(width)
            if kind == "group":
                return nn.GroupNorm(4, width)
            if kind == "pixel":
                return nn.LayerNorm(width)
            if net == "original-layer":
                return nn.LayerNorm([width, SIDES[layer], SIDES[layer]])
            return nn.GroupNorm(1, width)

        def normalized(self, layer, x):
            x = self.convs[layer](x)
            if net.endswith("pixel"):  # PyTorch takes the channels last
                return self.norms[layer](x.movedim(1, -1)).movedim(-1, 1)
            return self.norms[layer](x)

        def note(self, distances):
            self.nearest = min(self.nearest, distances.min().item())

        def relu(self, x):
            self.note(x.detach()[x != 0].abs())  # a zero of zeros, as at a border, is exact
            return torch.relu(x)

        def highest(self, windows):
            """The maximum over the last axis, of values that are not negative."""
            first, second = windows.detach().topk(2, -1).values.unbind(-1)
            self.note((first - second)[first > 0])  # where all are zero, ReLU has no gradient
            return windows.amax(-1)

        def max_pool(self, x):
            return self.highest(x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2))

        def block(self, layer, x):
            return self.relu(self.normalized(layer, x))

        def residual_block(self, one, two, x):
            return self.relu(self.normalized(two, self.block(one, x)) + x)

        def forward(self, x):
            if net.startswith(("residual", "standardized")):
                x = self.residual_block("C2", "C3", self.block("C1", x))
                x = self.block("C4", self.max_pool(x))
                x = self.max_pool(self.residual_block("C5", "C6", x))
                x = self.block("C7", x)
                x = torch.cat([x.mean((2, 3)), self.highest(x.flatten(2))], 1)[..., None, None]
                return nn.functional.log_softmax(self.convs["c8"](x).flatten(1), -1)
            x = self.block("C2", self.block("C1", x))
            x = self.max_pool(self.relu(self.convs["c3"](x)))
            x = self.block("C6", self.block("C5", self.block("C4", x)))
            x = self.max_pool(self.relu(self.convs["c7"](x)))
            x = self.block("C10", self.block("C9", self.block("C8", x)))
            x = nn.functional.avg_pool2d(x, 4 if net == "original-batch" else 5)
            return nn.functional.log_softmax(self.convs["c11"](x).flatten(1), -1)

    def to_torch(value):
        order = {4: (3, 2, 0, 1), 3: (2, 0, 1), 1: (0,)}[value.ndim]
        return torch.tensor(value.transpose(order).copy(), dtype=torch.float64)

    def to_flax(value):
        order = {4: (2, 3, 1, 0), 3: (1, 2, 0), 1: (0,)}[value.ndim]
        return value.detach().numpy().transpose(order)

    model = TorchNet().double()
    named = {}
    for layer in channels:
        named[f"{layer}/kernel"] = model.convs[layer].weight
        if layer in normed(net):
            named[f"{layer}_norm/scale"] = model.norms[layer].weight
            named[f"{layer}_norm/bias"] = model.norms[layer].bias
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(to_torch(drawn[name]))
    images, labels = draw_batches(seed)
    inputs = torch.tensor(((images / 255 - MEAN) / DEVIATION).transpose(0, 1, 4, 2, 3).copy())
    targets = torch.tensor(labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    results, losses = {"seed": np.array(seed)}, []
    for step in range(STEPS):
        optimizer.zero_grad()
        outputs = model(inputs[step])
        loss = nn.functional.nll_loss(outputs, targets[step])
        if model.nearest < CLEAR:
            return None
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            results["log_probabilities"] = outputs.detach().numpy().astype(np.float32)
            for name, parameter in named.items():
                results[f"gradient/{name}"] = sample(to_flax(parameter.grad))
        optimizer.step()
    results["losses"] = np.array(losses, np.float32)
    for name, parameter in named.items():
        results[f"parameter/{name}"] = sample(to_flax(parameter))
    for layer in normed(net) if net.endswith("batch") else ():
        norm = model.norms[layer]
        for name, average in (("mean", norm.running_mean), ("var", norm.running_var)):
            results[f"{name}/{layer}_norm"] = average.numpy().astype(np.float32)
    model.eval()
    results["evaluated"] = model(inputs[STEPS]).detach().numpy().astype(np.float32)
    return {f"{net}:{name}": value for name, value in results.items()}


def first_clear(net: str) -> dict[str, np.ndarray]:
    """Results of a net on the first images that are clear of ties."""
    return next(filter(None, (make(net, seed) for seed in itertools.count())))


if __name__ == "__main__":
    arrays = {name: value for net in NETS for name, value in first_clear(net).items()}
    np.savez_compressed(GOLDEN, **arrays)
    print(f"wrote {GOLDEN.name}: {GOLDEN.stat().st_size:,} bytes")
