"""Which nets train together, and on how many devices."""

from jaxnorm.config import Config, SweptNet, product, study
from jaxnorm.training.experiment import Experiment, mesh_for
from jaxnorm.training.mesh import MeshShape


def test_finished_nets_take_no_place_beside_those_that_are_left(tiny):
    config = Config("all", "matched", "tiny", 3, 16, seed=3, seeds=5)
    experiment = Experiment([config], tiny, MeshShape(seed=2))
    finished = [SweptNet(0, "batch", 3), SweptNet(0, "batch", 4), SweptNet(0, "group", 3)]
    finished += [SweptNet(0, "layer", seed) for seed in range(3, 8)]
    done = {net: 3 * (net in finished) for net in experiment.nets}
    of = [group.nets for group in experiment.groups(done)]
    assert [[(net.norm, net.seed) for net in nets] for nets in of] == [
        [("batch", 5), ("batch", 6)],
        [("group", 4), ("group", 5)],
        [("batch", 7)],
        [("group", 6), ("group", 7)],
    ]
    every = [(group.norm, group.nets[0].seed) for group in experiment.groups()]
    assert every == [(norm, seed) for seed in (3, 5, 7) for norm in ("batch", "group", "layer")]


def test_runs_train_together_where_they_differ_in_arguments_of_the_program_alone(tiny):
    """Whatever else a sweep may take, such as dropout, is compiled."""
    settings = {"norm": "layer", "batch_size": 16}
    configs = product(study, settings, {"dropout": (0.0, 0.1), "weight_decay": (0.0, 0.1, 0.2)})
    two = MeshShape(seed=2)
    of = [[net.run for net in group.nets] for group in Experiment(configs, tiny, two).groups()]
    assert of == [[0, 1], [2], [3, 4], [5]]
    swept = {"weight_decay": (0.0, 0.1), "learning_rate": (0.1, 0.2)}
    of = [group.nets for group in Experiment(product(study, settings, swept), tiny, two).groups()]
    assert of == [((i, "layer", 1), (i + 1, "layer", 1)) for i in (0, 2)]


def test_nets_at_the_same_epoch_train_together(tiny):
    """Those that are an epoch behind do not catch up inside a group: they are one of their own."""
    config = Config("layer", "matched", "tiny", 3, 16, seeds=4)
    done = {SweptNet(0, "layer", seed): epoch for seed, epoch in ((1, 2), (2, 1), (3, 2), (4, 1))}
    groups = Experiment([config], tiny, MeshShape(seed=2)).groups(done)
    assert [(group.start, [net.seed for net in group.nets]) for group in groups] == [
        (2, [1, 3]),
        (1, [2, 4]),
    ]


def test_nets_of_another_batch_size_take_no_devices():
    swept = {"batch_size": (32, 64), "learning_rate": (0.1, 0.2)}
    configs = product(study, {"norm": "layer"}, swept)[1:]  # one of 32, two of 64
    assert mesh_for(configs, configs[0], None) == MeshShape(1, 2)
    assert mesh_for(configs, configs[1], None) == MeshShape(2, 1)
