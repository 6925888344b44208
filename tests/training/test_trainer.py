"""Training in memory: what of it no run on disk shows."""

import time

from jaxnorm.config import Config
from jaxnorm.training import trainer
from jaxnorm.training.mesh import MeshShape


def test_nets_that_train_together_share_its_time(tiny):
    """However fast the machine is, their shares add up to no more than all that has passed."""
    config, clock = Config("layer", "three-layers", "tiny", 1, 35, seeds=2), time.monotonic()
    fits = trainer.fit(config, tiny, mesh=MeshShape(2))
    passed = time.monotonic() - clock
    records = [fit.epochs[0] for fit in fits.values()]
    spent = sum(record.train_seconds + record.test_seconds for record in records)
    assert 0 < spent <= passed + 0.002  # which are rounded to milliseconds
