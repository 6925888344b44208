"""Trains the norms of a configuration: in memory (`fit`), or into a run directory (`run`), and goes
on with a run that was cut off (`resume`).

Knows nothing of flags and pictures. What happens is told to an `Observer`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import checkpoints, devices, interrupts, job, progress, provenance, selfcheck, train
from jaxnorm import model as models
from jaxnorm.config import Config, Norm, UserError
from jaxnorm.data import Dataset, hold_out
from jaxnorm.devices import ONE, Layout
from jaxnorm.model import CNN
from jaxnorm.observers import Observer
from jaxnorm.progress import NOTHING, Begun
from jaxnorm.records import RESUMED_FIELDS, Epoch, Net, RunDirectory

PIECES = 20
"""Pieces in which an epoch is run, so that progress shows and a loss that is not finite is found
soon.
"""
SweptNet = tuple[int, Norm, int]
"""A net of a sweep: the number of its run, its norm and its seed."""
Predict = Callable[[jax.Array | np.ndarray], jax.Array]


class NonFiniteLoss(ArithmeticError):
    """The loss turned NaN or infinite.

    Names the norm, the seed, the epoch (from 1) and the step in it (from 1); the step is None where
    it is the loss of the evaluation after the epoch. `place` is the net's in its group.
    """

    def __init__(
        self, norm: str, seed: int, epoch: int, step: int | None, loss: float, place: int = 0
    ) -> None:
        which, where = ("evaluation", "") if step is None else ("training", f", step {step}")
        super().__init__(
            f"the {which} loss of {norm} norm, seed {seed}, is {loss} at epoch {epoch}{where}: try "
            "a smaller --learning-rate; the epochs before it, and the last good checkpoint, are "
            "kept"
        )
        self.norm, self.seed, self.epoch, self.step, self.place = norm, seed, epoch, step, place


@dataclass(frozen=True)
class Fit:
    """One trained net, in memory."""

    norm: Norm
    seed: int
    parameters: int
    epochs: list[Epoch]
    step_losses: np.ndarray  # f32[epochs * steps]
    logits: np.ndarray  # f32[M, classes], of the test set after the last epoch
    state: train.TrainState
    recipe: train.Recipe

    def predict(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
        return _predict(self.recipe, self.state)(images)


def make_recipe(
    config: Config,
    dataset_mean: tuple,
    dataset_deviation: tuple,
    num_classes: int,
    norm: Norm,
    layout: Layout = ONE,
) -> train.Recipe:
    """The recipe of one norm under a configuration, on a mesh."""
    net = CNN(
        norm,
        config.arch,
        num_classes,
        config.groups,
        config.dropout,
        precision=config.precision,
    )
    return train.Recipe(
        net,
        config.learning_rate,
        config.momentum,
        tuple(dataset_mean),
        tuple(dataset_deviation),
        layout,
    )


def check(config: Config, dataset: Dataset) -> dict[str, int]:
    """The parameters of each norm's net.

    Raises `UserError` for what can be known to fail before training starts.
    """
    if config.precision == "tf32" and jax.default_backend() != "gpu":
        raise UserError(
            "--precision tf32 needs an NVIDIA GPU, and there is none: choose float32 or bfloat16"
        )
    count = len(dataset.train_labels)
    if config.validation >= count:
        raise UserError(
            f"--validation {config.validation} leaves none of the {count} training images of "
            f"{dataset.name} to train on"
        )
    if config.batch > count - config.validation:
        held = f", of which {config.validation} are held out" if config.validation else ""
        raise UserError(
            f"--batch-size {config.batch} is larger than the {count} training images of "
            f"{dataset.name}{held}"
        )
    return check_models(config, len(dataset.class_names))


def check_models(config: Config, num_classes: int) -> dict[str, int]:
    """The parameters of each norm's net.

    Raises `UserError` for groups that do not divide, and for more than 50,000 parameters.
    """
    counts = {}
    for norm in config.norms:
        counts[norm] = models.count_parameters(CNN(norm, config.arch, num_classes, config.groups))
        if counts[norm] > models.LARGEST and not config.allow_large:
            raise UserError(
                f"the {norm} net has {counts[norm]:,} parameters, more than {models.LARGEST:,}: "
                "add --allow-large to train it all the same"
            )
    return counts


@dataclass(frozen=True)
class Group:
    """Nets that train in one program: of one norm and batch size."""

    norm: Norm
    nets: tuple[tuple[int, int], ...]
    """The number of each net's run (0 where there is one alone) and its seed."""
    layout: Layout
    places: int
    """How many nets the program trains, a multiple of the mesh's rows; where there are fewer, the
    last is trained again in the empty places, and left out.
    """

    @property
    def seeds(self) -> list[int]:
        """Of its nets."""
        return [seed for _, seed in self.nets]

    @property
    def filled(self) -> tuple[tuple[int, int], ...]:
        """Its nets with every place filled."""
        return self.nets + self.nets[-1:] * (self.places - len(self.nets))


def layout_of(configs: Sequence[Config], batch_size: int, layout: Layout | None = None) -> Layout:
    """The mesh for the nets of that batch size: the given one, or the one chosen for as many.

    Raises `UserError` where the given one cannot be had.
    """
    if layout is None:
        nets = sum(config.seeds for config in configs if config.batch == batch_size)
        return devices.choose(nets, batch_size)
    layout.check(batch_size)
    return layout


def groups(
    configs: Sequence[Config], dataset: Dataset, layout: Layout | None = None
) -> Iterator[Group]:
    """All nets of runs that differ in batch size and learning rate alone, in the order in which
    they train: by batch size; then as many as train in one program together, run by run; and all
    norms of these before the next.
    """
    for batch_size in dict.fromkeys(config.batch for config in configs):
        own = [(i, config) for i, config in enumerate(configs) if config.batch == batch_size]
        mesh = layout_of(configs, batch_size, layout)
        recipes = [_recipe(own[0][1], dataset, norm, mesh) for norm in own[0][1].norms]
        at_once = min(train.nets_at_once(recipe, batch_size) for recipe in recipes)
        nets = [(i, seed) for i, config in own for seed in config.seed_numbers]
        count = -(-len(nets) // (at_once * mesh.seed))
        size = -(-len(nets) // count)
        places = -(-size // mesh.seed) * mesh.seed
        for part in np.array_split(np.array(nets), count):
            for norm in own[0][1].norms:
                yield Group(norm, tuple((i, seed) for i, seed in part.tolist()), mesh, places)


class Nets:
    """The nets of a group, with all that they train on, on the mesh."""

    def __init__(self, configs: Sequence[Config], dataset: Dataset, group: Group) -> None:
        self.group, self.config = group, configs[group.nets[0][0]]
        # The first run's learning rate stands in the recipe, and each net has its own: one program.
        self.recipe = _recipe(configs[0], dataset, group.norm, group.layout)
        self.images, self.labels, self.test_images, self.test_labels = devices.place(
            group.layout,
            (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels),
        )
        splits = [
            hold_out(dataset.train_labels, self.config.validation, seed) for _, seed in group.filled
        ]
        self.seeds, self.rates, self.rows, self.held = self.place(
            (
                np.array([seed for _, seed in group.filled], np.uint32),
                np.array([configs[run].learning_rate for run, _ in group.filled], np.float32),
                np.stack([rows for rows, _ in splits]),
                np.stack([held for _, held in splits]),
            )
        )
        self.count = len(dataset.train_labels) - self.config.validation
        self.steps = -(-self.count // self.config.batch)

    def place(self, arrays: Any) -> Any:
        """Puts each net's part on its devices."""
        return devices.place(self.group.layout, arrays, by_net=True)

    def initial(self) -> list[train.TrainState]:
        """The state of each net before the first step, in NumPy's arrays."""
        return [jax.device_get(train.init_state(self.recipe, s)) for s in self.group.seeds]

    def begin(self, states: Sequence[train.TrainState]) -> train.TrainState:
        """Stacks the states of the group's nets and puts them on the mesh."""
        filled = [*states, *[states[-1]] * (self.group.places - len(states))]
        return self.place(jax.tree.map(lambda *each: np.stack(each), *filled))

    def pieces(self, epoch: int) -> tuple[list[train.Piece], jax.Array]:
        """What the nets train on in an epoch, and the key of its dropout masks."""
        return train.epoch_of_nets(
            self.recipe, self.seeds, epoch, self.rows, self.config.batch, PIECES
        )

    def advance(
        self, state: train.TrainState, piece: train.Piece, keys: jax.Array
    ) -> tuple[train.TrainState, train.Steps]:
        """Trains on one piece of an epoch. `state` is consumed."""
        batches, *bounds = piece
        return train.train_nets(
            self.recipe, state, self.images, self.labels, batches, keys, self.rates, *bounds
        )

    def device_bytes(
        self, state: train.TrainState, piece: train.Piece, keys: jax.Array
    ) -> int | None:
        """The memory that training takes on a device, its data included, by XLA's account; None
        where XLA gives none.
        """
        batches, *bounds = piece
        lowered = train.train_nets.lower(
            self.recipe, state, self.images, self.labels, batches, keys, self.rates, *bounds
        )
        account: Any = lowered.compile().memory_analysis()
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        if account is None or not all(hasattr(account, name) for name in sizes):
            return None
        return sum(getattr(account, name) for name in sizes) - account.alias_size_in_bytes

    def evaluate(self, state: train.TrainState) -> tuple[train.Evaluation, train.Evaluation | None]:
        """On the test images and, if any are, on the held out ones; in NumPy's arrays."""
        test = train.evaluate_nets(self.recipe, state, self.test_images, self.test_labels)
        if not self.config.validation:
            return devices.fetch(test), None
        validation = train.evaluate_nets(self.recipe, state, self.images, self.labels, self.held)
        return devices.fetch(test), devices.fetch(validation)


def self_check(
    config: Config | Sequence[Config], dataset: Dataset, layout: Layout | None = None
) -> None:
    """Checks, before anything is trained, that this installation computes the nets of a run, or of
    the runs of a sweep, rightly (see `selfcheck`), by the programs that will train them.

    Raises `selfcheck.WrongNumbers`.
    """
    configs = [config] if isinstance(config, Config) else config
    selfcheck.check_compiler()
    checked = set()
    for group in groups(configs, dataset, layout):
        program = group.norm, configs[group.nets[0][0]].batch
        if program not in checked:
            checked.add(program)
            _check_step(configs, dataset, group)


def _check_step(configs: Sequence[Config], dataset: Dataset, group: Group) -> None:
    """Every place of the program trains the group's first net, and each is compared."""
    first = dataclasses.replace(group, nets=group.nets[:1])
    nets = Nets(configs, dataset, first)
    (piece, *_), keys = nets.pieces(1)
    initial = nets.initial()
    rows = devices.fetch(piece.batches)[0]

    def step(i: int) -> selfcheck.Step:
        """One step of the training program."""
        at = piece._replace(start=i, stop=i + 1)
        state, steps = nets.advance(nets.begin(initial), at, keys)
        return selfcheck.Step(devices.fetch(steps.losses)[:, i], devices.fetch(state))

    selfcheck.check_step(
        nets.recipe,
        initial[0],
        dataset.train_images,
        dataset.train_labels,
        rows,
        train.derive_key(group.seeds[0], "dropout", 1),
        step,
    )


def _recipe(config: Config, dataset: Dataset, norm: Norm, layout: Layout) -> train.Recipe:
    mean, deviation, classes = dataset.mean, dataset.deviation, len(dataset.class_names)
    return make_recipe(config, mean, deviation, classes, norm, layout)


class Trained(NamedTuple):
    """What an epoch made of one net."""

    run: int  # the number of the net's run
    record: Epoch
    state: train.TrainState  # in NumPy's arrays, as all of it
    losses: np.ndarray  # f32[steps], of this epoch
    logits: np.ndarray  # f32[M, classes], of the test set after it


def _train(
    configs: Sequence[Config],
    dataset: Dataset,
    group: Group,
    observer: Observer,
    states: Sequence[train.TrainState] | None = None,
    complete: int = 0,
    last: int | None = None,
) -> Iterator[list[Trained]]:
    """Trains the nets of a group, epoch by epoch up to the last one. With `states`, from these,
    after so many complete epochs.
    """
    nets = Nets(configs, dataset, group)
    state = nets.begin(states or nets.initial())
    observer.on_nets(group.norm, group.seeds, nets.steps)
    for epoch in range(complete + 1, (last or nets.config.epochs) + 1):
        clock = time.perf_counter()
        state, losses, correct = _train_epoch(nets, state, epoch, observer)
        trained = time.perf_counter()
        test, validation = nets.evaluate(state)
        tested = time.perf_counter()
        for each in (test, validation):
            if each is not None and not np.isfinite(each.logits).all():
                which = int(np.argwhere(~np.isfinite(each.logits))[0][0])
                loss = float(each.loss[which])
                raise NonFiniteLoss(group.norm, group.filled[which][1], epoch, None, loss, which)
        seconds = (trained - clock) / len(group.nets), (tested - trained) / len(group.nets)
        whole = devices.fetch(state)
        yield [
            Trained(
                run,
                Epoch(
                    group.norm,
                    seed,
                    epoch,
                    _mean_loss(losses[i], nets.count, nets.config.batch),
                    int(correct[i]) / nets.count,
                    float(test.loss[i]),
                    _fraction(test.accuracy[i], len(dataset.test_labels)),
                    *(round(each, 3) for each in seconds),
                    **_validated(validation, i, nets.config.validation),
                ),
                jax.tree.map(lambda leaf, i=i: leaf[i], whole),
                losses[i],
                np.asarray(test.logits[i]),
            )
            for i, (run, seed) in enumerate(group.nets)
        ]


def _train_epoch(
    nets: Nets, state: train.TrainState, epoch: int, observer: Observer
) -> tuple[train.TrainState, np.ndarray, np.ndarray]:
    """One epoch of all nets: the new state, the losses f32[K, steps], and how many images each
    classified rightly i32[K].
    """
    losses = np.zeros((nets.group.places, 0), np.float32)
    correct = np.zeros(nets.group.places, int)
    pieces, keys = nets.pieces(epoch)
    for piece in pieces:
        state, steps = nets.advance(state, piece, keys)
        done = devices.fetch(steps)
        new = done.losses[:, piece.start : piece.stop]
        losses = np.concatenate([losses, new], axis=1)
        correct += done.correct
        if not np.isfinite(new).all():
            which, step = np.argwhere(~np.isfinite(losses))[0]
            seed, loss = nets.group.filled[which][1], float(losses[which, step])
            raise NonFiniteLoss(nets.group.norm, seed, epoch, int(step) + 1, loss, int(which))
        interrupts.check()
        observer.on_steps(epoch, losses.shape[1])
    return state, losses, correct


def _mean_loss(losses: np.ndarray, count: int, batch_size: int) -> float:
    """The mean over an epoch's images of the mean losses of its batches, the last one ragged."""
    sizes = np.full(len(losses), batch_size)
    sizes[-1] = count - batch_size * (len(losses) - 1)
    return float(np.average(losses.astype(np.float64), weights=sizes))


def _validated(validation: train.Evaluation | None, i: int, count: int) -> dict[str, float]:
    """What an epoch's record says of a net's validation, if there is one."""
    if validation is None:
        return {}
    accuracy = _fraction(validation.accuracy[i], count)
    return {"validation_loss": float(validation.loss[i]), "validation_accuracy": accuracy}


def _fraction(accuracy: Any, count: int) -> float:
    """An accuracy in float32 as the double nearest to the fraction that it is."""
    return round(float(accuracy) * count) / count


def fit(
    config: Config,
    dataset: Dataset,
    observer: Observer | None = None,
    layout: Layout | None = None,
) -> dict[tuple[Norm, int], Fit]:
    """Trains every net of `config` on `dataset` without touching the disk.

    Returns a net for each (norm, seed). Raises `UserError` and `NonFiniteLoss`.
    """
    observer = observer or Observer()
    counts, results = check(config, dataset), {}
    for group in groups([config], dataset, layout):
        told = []
        for nets in _train([config], dataset, group, observer):
            told.append(nets)
            for net in nets:
                observer.on_epoch(net.record)
        recipe = _recipe(config, dataset, group.norm, ONE)
        for i, seed in enumerate(group.seeds):
            history = [nets[i] for nets in told]
            results[group.norm, seed] = Fit(
                group.norm,
                seed,
                counts[group.norm],
                [net.record for net in history],
                np.concatenate([net.losses for net in history]),
                history[-1].logits,
                history[-1].state,
                recipe,
            )
    return {net: results[net] for net in config.nets}


def run(
    config: Config,
    dataset: Dataset,
    directory: RunDirectory,
    command: str,
    observer: Observer | None = None,
    layout: Layout | None = None,
    **about: Any,
) -> None:
    """Trains every net of `config` on `dataset` into a run directory.

    After each epoch the checkpoint, the losses and the predictions are written, and then the
    epoch's line, which makes it complete. `about` is what else `run.json` says (`self_check`,
    `deterministic`). Raises `UserError`, `NonFiniteLoss` and OSError.
    """
    check(config, dataset)
    with directory.locked():
        RunDirectory.check_unused(directory.path)
        train_runs([config], dataset, [directory], command, observer, layout, **about)


def resume(
    dataset: Dataset,
    directory: RunDirectory,
    command: str,
    observer: Observer | None = None,
    self_check: str = "not made",
    layout: Layout | None = None,
) -> None:
    """Goes on with a run from the newest complete epoch of each net, to its end.

    A damaged checkpoint is told to the observer, and the one before it used. On a CPU what comes
    out equals an unbroken run on the same mesh bit for bit, but for the times. Raises `UserError`
    where the directory is no run, another process writes to it, or the data is not what it was
    trained on.
    """
    with directory.locked():
        config = directory.info().config
        check(config, dataset)
        train_runs([config], dataset, [directory], command, observer, layout, self_check=self_check)


def train_runs(
    configs: Sequence[Config],
    dataset: Dataset,
    directories: Sequence[RunDirectory],
    command: str,
    observer: Observer | None = None,
    layout: Layout | None = None,
    **about: Any,
) -> None:
    """Trains, or goes on with, the runs of a sweep: configurations that differ in batch size and
    learning rate alone, each in a directory of its own, as far as it is not there yet.

    In a job of several processes all of them call it, and the first alone touches the directories.
    """
    observer = observer or Observer()
    with contextlib.ExitStack() as stack:
        begun: dict[SweptNet, Begun] = {}

        def ready() -> tuple[bool, list[int]]:
            """Readies the directories; whether there was any run, and every net's epochs."""
            again = any((each.path / "run.json").exists() for each in directories)
            for i, (config, directory) in enumerate(zip(configs, directories, strict=True)):
                stack.enter_context(directory.locked())
                found = _ready(config, dataset, directory, command, observer, layout, about)
                begun.update({(i, *net): far for net, far in found.items()})
            return again, [begun[net].epochs if net in begun else 0 for net in _all_nets(configs)]

        again, epochs_of = job.from_first(ready)
        complete = dict(zip(_all_nets(configs), epochs_of, strict=True))
        if again:
            observer.on_begun(sum(complete.values()))
        for net, epochs in complete.items():
            if net not in begun:  # the first process's
                begun[net] = NOTHING._replace(epochs=epochs)
        for group in groups(configs, dataset, layout):
            _train_group(configs, dataset, group, directories, observer, begun)
        if job.first():
            for directory in directories:
                progress.put_in_order(directory)


def _all_nets(configs: Sequence[Config]) -> list[SweptNet]:
    return [(i, norm, seed) for i, config in enumerate(configs) for norm, seed in config.nets]


def _ready(
    config: Config,
    dataset: Dataset,
    directory: RunDirectory,
    command: str,
    observer: Observer,
    layout: Layout | None,
    about: dict[str, Any],
) -> dict[Net, Begun]:
    """Begins a run's records, or finds how far they are; returns what is begun."""
    mesh = layout_of([config], config.batch, layout)
    counts = check(config, dataset)
    now = provenance.describe(config, dataset, counts, command, mesh=str(mesh), **about)
    if not (directory.path / "run.json").exists():
        directory.write_info(now)
        return {}
    info = directory.info()
    if dataset.fingerprint != info.dataset["fingerprint"]:
        raise UserError(
            f"the data found is not what {directory.path} was trained on: give its --data-dir"
        )
    directory.sweep()
    recipes: dict[Norm, train.Recipe] = {
        norm: _recipe(info.config, dataset, norm, ONE) for norm in info.config.norms
    }
    train_count = len(dataset.train_labels)
    begun = progress.rewind(directory, recipes, train_count, observer.on_warning)
    if all(each.epochs == config.epochs for each in begun.values()):
        return begun
    if now.code != info.code or now.device != info.device:
        observer.on_warning(
            "the run was begun by other code or on other devices (compare its run.json): it goes "
            "on, but not bit for bit as it would have there"
        )
    again = {name: getattr(now, name) for name in RESUMED_FIELDS}
    directory.write_info(dataclasses.replace(info, resumed=[*info.resumed, again]))
    return begun


def _train_group(
    configs: Sequence[Config],
    dataset: Dataset,
    group: Group,
    directories: Sequence[RunDirectory],
    observer: Observer,
    begun: dict[SweptNet, Begun],
) -> None:
    """Trains the nets of a group to their end, and writes them down."""
    far = {net: begun[net[0], group.norm, net[1]] for net in group.nets}
    with contextlib.ExitStack() as stack:
        stored = {
            net: stack.enter_context(
                checkpoints.writer(directories[net[0]].checkpoints(group.norm, net[1]))
            )
            for net, each in far.items()
            if job.first() and each.epochs < configs[net[0]].epochs
        }

        def keep(net: tuple[int, int], each: Trained) -> None:
            """Writes an epoch of a net down, in the first process, and tells of it."""
            far[net] = Begun(
                each.record.epoch, each.state, np.concatenate([far[net].losses, each.losses])
            )
            if len(configs) > 1:
                observer.on_run(each.run, configs[each.run])
            if net in stored:
                _write(directories[each.run], stored[net], each, far[net].losses, dataset)
            observer.on_epoch(each.record)

        _train_rest(configs, dataset, group, observer, far, keep)


def _train_rest(
    configs: Sequence[Config],
    dataset: Dataset,
    group: Group,
    observer: Observer,
    far: dict[tuple[int, int], Begun],
    keep: Callable[[tuple[int, int], Trained], None],
) -> None:
    """Trains what the nets of a group lack, each as far as it is; `keep` is given every epoch.

    Nets that were cut off between their lines are an epoch apart: those behind catch up first. In a
    sweep a net whose loss is not finite any more is told of and left, and the others go on.
    """
    epochs = configs[group.nets[0][0]].epochs
    recipe = _recipe(configs[0], dataset, group.norm, group.layout)
    left = list(group.nets)
    while left and (least := min(far[net].epochs for net in left)) < epochs:
        behind = tuple(net for net in left if far[net].epochs == least)
        last = min({far[net].epochs for net in left} - {least}, default=epochs)
        states = None
        if least:
            shapes = train.init_state.eval_shape(recipe, 0)
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            own = [far[net].state or zeros for net in behind]
            states = job.arrays_from_first(jax.tree.map(np.asarray, own))
        part = dataclasses.replace(group, nets=behind)
        try:
            for trained in _train(configs, dataset, part, observer, states, least, last):
                with interrupts.uninterrupted():
                    for net, each in zip(behind, trained, strict=True):
                        keep(net, each)
        except NonFiniteLoss as error:
            if len(configs) == 1:
                raise
            net = behind[min(error.place, len(behind) - 1)]
            left.remove(net)
            config = configs[net[0]]
            observer.on_warning(
                f"batch size {config.batch}, learning rate {config.learning_rate:g}: {error}; the "
                "sweep goes on without this net"
            )


def _write(
    directory: RunDirectory,
    stored: checkpoints.Writer,
    each: Trained,
    losses: np.ndarray,
    dataset: Dataset,
) -> None:
    """Writes a net's epoch down; the line, which makes it complete, is the last."""
    norm, seed = each.record.norm, each.record.seed
    stored.save(each.record.epoch, each.state._asdict())
    directory.write_step_losses(norm, seed, losses)
    directory.write_predictions(norm, seed, each.logits, dataset.test_labels)
    directory.append_epoch(each.record)


def write_times(directory: RunDirectory, net: Trained, dataset: Dataset, count: int) -> list[float]:
    """Seconds that writing down an epoch of a net takes, so many times over, for a plan."""
    path = directory.checkpoints(net.record.norm, net.record.seed)
    times = []
    with checkpoints.writer(path) as stored:
        for epoch in range(1, count + 1):
            again = net._replace(record=dataclasses.replace(net.record, epoch=epoch))
            clock = time.perf_counter()
            _write(directory, stored, again, net.losses, dataset)
            times.append(time.perf_counter() - clock)
    return times


def load_state(path: Path | str, norm: Norm, seed: int) -> tuple[train.Recipe, train.TrainState]:
    """The recipe and the newest complete epoch's checkpoint of a net of a run.

    Raises `UserError` where the run has no checkpoint of that norm and seed, or a damaged one.
    """
    directory = RunDirectory(path)
    info = directory.info()
    if norm not in info.config.norms or not directory.checkpoints(norm, seed).is_dir():
        raise UserError(f"{path} has no checkpoint of {norm} norm, seed {seed}")
    data = info.dataset
    classes = len(data["class_names"])
    recipe = make_recipe(
        info.config,
        data["mean"],
        data["deviation"],
        classes,
        norm,
        devices.local(info.config.batch),
    )
    shapes = train.init_state.eval_shape(recipe, seed)._asdict()
    complete = sum((each.norm, each.seed) == (norm, seed) for each in directory.epochs())
    stored = directory.checkpoints(norm, seed)
    if complete not in checkpoints.epochs(stored):
        raise UserError(f"{path} has no complete epoch of {norm} norm, seed {seed}")
    try:
        state = checkpoints.restore(stored, complete, shapes)
    except checkpoints.Damaged as error:
        raise UserError(f"{error}: python -m jaxnorm.run --resume {path} mends it") from None
    return recipe, train.TrainState(**train.replicate(recipe, state))


def load_model(path: Path | str, norm: Norm, seed: int) -> Predict:
    """The trained net of a run: a pure `predict(images u8[N, 32, 32, 3]) -> probabilities f32[N,
    classes]`.

    Raises `UserError` where the run has no checkpoint of that norm and seed.
    """
    return _predict(*load_state(path, norm, seed))


def _predict(recipe: train.Recipe, state: train.TrainState) -> Predict:
    def predict(images: jax.Array | np.ndarray) -> jax.Array:
        """Probabilities f32[N, classes] of u8[N, 32, 32, 3] images; ValueError for any other."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
            raise ValueError(
                f"predict takes images u8[N, 32, 32, 3], not {images.dtype}{list(images.shape)}"
            )
        logits = train.predict_logits(recipe, state.params, state.batch_stats, jnp.asarray(images))
        return jax.nn.softmax(logits)

    return predict
