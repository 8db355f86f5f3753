"""The one door: stages by name or by file, each with its own folder and prefix, each resumable."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from runs import ROOT, checksums, numbers, rows, run, start, stop_at

from dpojax.algorithms.table import ALGORITHMS
from dpojax.algorithms.walk import stage_of_row
from dpojax.config.schema import STAGES
from dpojax.errors import CheckpointError
from dpojax.training.checkpoint import Checkpoints

REINFORCE = ROOT / "experiments/own_algorithm/reinforce.py"
SETTINGS = {
    "stages": f"sft,{REINFORCE}:REINFORCE",
    "sft.num_steps": 4,
    "num_steps": 6,
    "sample.max_new_tokens": 8,
}


def test_the_table_holds_the_stages_that_a_config_may_name():
    assert tuple(ALGORITHMS) == STAGES
    assert all(name == algorithm.name for name, algorithm in ALGORITHMS.items())
    folders = [algorithm.folder for algorithm in ALGORITHMS.values()]
    prefixes = [algorithm.prefix for algorithm in ALGORITHMS.values()]
    assert len(set(folders)) == len(folders) and len(set(prefixes)) == len(prefixes)


def test_a_row_belongs_to_the_stage_with_the_longest_prefix_of_its_keys():
    prefixes = ["sft_", "", "reinforce_"]
    assert stage_of_row({"step": 1, "sft_loss": 1.0}, prefixes) == 0
    assert stage_of_row({"step": 1, "eval_loss": 1.0, "loss": 1.0}, prefixes) == 1
    assert stage_of_row({"step": 1, "reinforce_loss": 1.0}, prefixes) == 2


@pytest.mark.slow
def test_an_algorithm_outside_the_package_enters_by_stages_and_resumes_bit_equal(files, tmp_path):
    assert len(REINFORCE.read_text().splitlines()) < 60
    whole = tmp_path / "whole"
    run(files, whole, **SETTINGS)
    logged = rows(whole)
    steps = [row["step"] for row in logged if "reinforce_loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert {tuple(sorted(row)) for row in logged if "sft_loss" in row}
    assert all(np.isfinite(row["reinforce_objective/scores"]) for row in logged[-6:])
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["num_steps"] == 6 and "loss" not in logged[-1]

    stopped = tmp_path / "stopped"
    stop_at(start(files, stopped, **SETTINGS), "reinforce 2/")
    run(files, stopped, **SETTINGS)
    assert numbers(stopped) == numbers(whole)
    assert checksums(stopped / "reinforce", 6) == checksums(whole / "reinforce", 6)
    assert checksums(stopped / "sft", 4) == checksums(whole / "sft", 4)


def old_state(params, optimizer):
    """A training state as dpojax 0.1 saved it: one tree of parameters, without roles."""
    zero = jnp.zeros(())
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": zero,
        "skipped": zero,
        "loss_average": zero,
        "reward_mean": zero,
    }


def test_a_state_without_roles_is_refused_with_the_reason_and_its_weights_are_read(tmp_path):
    optimizer = optax.adam(1e-3)
    params = {"embed": jnp.arange(6.0).reshape(2, 3)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, old_state(params, optimizer), {"evaluation_due": False})
    assert checkpoints.wait() is None
    abstract = jax.eval_shape(lambda: tiny.policy_state(optimizer, params))
    with pytest.raises(CheckpointError, match=r"dpojax 0\.1 wrote it.*model\.init=WORKDIR"):
        checkpoints.compare_shapes(3, abstract, cast=False)
    shapes = jax.eval_shape(lambda: params)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    meta = checkpoints.meta(3)
    # A NamedTuple's fields are named with a dot in the checksums of dpojax 0.1.
    meta["checksums"] = {
        name.replace("['params']", ".params"): value for name, value in meta["checksums"].items()
    }
    restored = checkpoints.restore_params(3, shapes, shardings, meta)
    np.testing.assert_array_equal(restored["embed"], params["embed"])
    checkpoints.close()
