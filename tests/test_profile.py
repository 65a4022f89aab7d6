"""`--profile` traces the steps it is told, and changes nothing else."""

import numpy as np
import pytest
import tiny_run

from luthier import config as configs
from luthier import train
from luthier.errors import LuthierError


def test_a_trace_of_two_steps(tmp_path):
    path = tiny_run.write_run(tmp_path, "c.stage(data=DATA, steps=4, batch_size=4, sequence_length=48)")
    train(configs.load(str(path)), tmp_path / "plain")
    train(configs.load(str(path)), tmp_path / "traced", profile="2:3")
    assert len(list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))) == 1
    np.testing.assert_array_equal(tiny_run.losses(tmp_path / "traced"), tiny_run.losses(tmp_path / "plain"))
    with pytest.raises(LuthierError, match="--profile"):
        train(configs.load(str(path)), tmp_path / "wrong", profile="3")
    assert not (tmp_path / "wrong").exists()
