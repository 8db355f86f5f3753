"""A name that a setting may take stands in one place; every table that is looked up by it has
exactly these names, and every text that lists them lists them all.
"""

from typing import Any

import jax
import optax
from runs import ROOT

from dpojax import errors, main
from dpojax.config.load import from_config_dict, load_config_file
from dpojax.config.model import LOGICAL_AXES, QUANTISED, SHARDING_RULES
from dpojax.config.schema import setting_choices
from dpojax.config.training import OPTIMIZERS
from dpojax.cost.step_work import RECOMPUTED
from dpojax.models.config import ACTIVATIONS
from dpojax.models.families import fields
from dpojax.models.layer import ACTIVATION
from dpojax.models.quantise import QTYPES
from dpojax.models.remat import REMAT
from dpojax.runtime.devices import PEAK_FLOPS, TPUS
from dpojax.training.optimizer import make_optimizer, make_schedule
from dpojax.weights.export import ACTIVATION_NAMES


def test_tables_by_a_settings_name_have_the_names_of_the_setting():
    assert set(REMAT) == set(RECOMPUTED) == set(setting_choices()["model.remat"])
    assert set(QTYPES) == set(QUANTISED)
    assert set(SHARDING_RULES) <= set(LOGICAL_AXES)
    assert {chip.kind for chip in TPUS.values()} <= set(PEAK_FLOPS)


def test_activations_are_computed_read_and_written_under_their_names():
    assert set(ACTIVATION) == set(fields.ACTIVATIONS.values()) == set(ACTIVATIONS)
    assert set(ACTIVATION_NAMES) == set(ACTIVATIONS)
    for name, written in ACTIVATION_NAMES.items():
        assert fields.ACTIVATIONS[written] == name


def test_every_optimizer_and_schedule_that_a_config_may_name_is_made():
    values: Any = load_config_file("tldr")
    for name in OPTIMIZERS:
        values.optim.name = name
        optimizer = make_optimizer(
            from_config_dict(values).optim, optax.constant_schedule(1e-3), {"w": ("embed", "mlp")}
        )
        jax.eval_shape(optimizer.init, {"w": jax.ShapeDtypeStruct((2, 2), "float32")})
    for name in setting_choices()["optim.schedule"]:
        make_schedule(name, learning_rate=1e-3, warmup_steps=2, num_steps=4)


def test_a_config_without_rules_of_its_own_shards_as_the_commands_do():
    assert from_config_dict(load_config_file("tldr")).mesh.rules == SHARDING_RULES


def test_every_text_lists_the_exit_codes_of_the_errors():
    for text in (main.USAGE, main.__doc__ or ""):
        assert errors.describe_exit_codes() in " ".join(text.split())
    table = (ROOT / "dpojax/training/README.md").read_text().splitlines()
    for kind in errors.DpojaxError.__subclasses__():
        (row,) = [line for line in table if line.startswith(f"| {kind.exit_code} |")]
        assert kind.about in row, row
