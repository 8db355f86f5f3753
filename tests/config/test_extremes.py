"""The smallest and the largest legal value of every setting that is a number: a trained run, or a
sentence and exit 2.
"""

import contextlib
import dataclasses
import types
import typing
from typing import Any

import jax
import model_folders
import pytest
from runs import ROOT

from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.config.schema import Config
from dpojax.errors import ConfigError, DpojaxError, Interrupted
from dpojax.whole_run import run

# Candidates, the most extreme first: the first that a config takes is tried.
SMALLEST = {int: ["-1", "0", "1", "2"], float: ["0", "1e-45", "1.2e-38", "1e-6", "1.000001"]}
LARGEST = {int: ["2147483647", "64", "8", "4"], float: ["3.4e38", "1", "0.999999", "0.499999"]}
FEW = {
    "num_steps": "2",
    "batch_size": "2",
    "log_every_steps": "1",
    "eval_every_steps": "2",
    "checkpoint_every_steps": "2",
    "self_check": "off",
    "data.micro_batch_tokens": "256",
    "model.hidden_size": "32",
    "model.intermediate_size": "48",
    "model.head_dim": "8",
    "model.num_heads": "4",
    "model.num_kv_heads": "2",
    "model.num_layers": "1",
    "sft.num_steps": "0",
    "sft.batch_size": "2",
    "sample.num_prompts": "0",
    "sample.kl_prompts": "0",
    "sample.max_new_tokens": "4",
    "sample.reward": "",
    "optim.warmup_steps": "1",
    "sft.warmup_steps": "1",
    "mesh.data": "1",
    "mesh.fsdp": "-1",
}
# What a section's settings act on is in the run of its own settings alone: programs take most of
# the time.
SAMPLED = {"sample.reward": f"{ROOT / 'tests/support/length_reward.py'}:reward"}
WITH = {
    "sft.": {"sft.num_steps": "1"},
    "sample.": {"sample.num_prompts": "2", "sample.kl_prompts": "1"},
    "lora.": {"lora.rank": "2"},
    "reward.": {"stages": "policy_gradient", "policy_gradient.num_samples": "2", **SAMPLED},
    "policy_gradient.": {
        "stages": "policy_gradient",
        "policy_gradient.num_samples": "2",
        "policy_gradient.preset": "ppo",
        **SAMPLED,
    },
    "online_dpo.": {"stages": "online_dpo", "online_dpo.num_samples": "2", **SAMPLED},
    "reward_model.": {"stages": "reward_model", "reward_model.num_steps": "2"},
}
# Runs of other stages than the default's cost most; one setting of each is in CI.
IN_CI = (
    "policy_gradient.horizon",
    "online_dpo.temperature",
    "reward_model.centring",
    "reward.beta",
)
# Of what the machine holds, and of hours: their largest values are another test's, or none's.
TOO_LARGE = {
    "model.max_positions",
    *(
        f"model.{s}"
        for s in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
    ),
}


class StopAfter(contextlib.AbstractContextManager):
    """Asks a run to stop after two steps: enough to see that it
    trains, however many it was told.
    """

    def __exit__(self, *exception):
        return None

    def __call__(self, step):
        return 143 if step >= 2 else 0


def numbers(cls: Any = Config, prefix=""):
    """(dotted name, type) of every setting that is a number."""
    for name, kind in typing.get_type_hints(cls).items():
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if dataclasses.is_dataclass(kind):
            yield from numbers(kind, f"{prefix}{name}.")
        elif kind in (int, float):
            yield f"{prefix}{name}", kind


def config_with(files, pairs, changes):
    values = load_config_file(str(ROOT / "configs/tldr.py"))
    settings = FEW | {
        "data.train": str(pairs),
        "data.eval": str(pairs),
        "tokenizer": str(files / "tokenizer.model"),
    }
    for section, beside in WITH.items():
        if any(key.startswith(section) for key in changes):
            settings |= beside
    for key, text in (settings | changes).items():
        apply_override(values, key, text)
    return from_config_dict(values)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return model_folders.write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def cases():
    """Every number with its type."""
    for name, kind in numbers():
        of_stage = name.startswith(("policy_gradient.", "online_dpo.", "reward_model.", "reward."))
        marks = [pytest.mark.exhaustive] * (of_stage and name not in IN_CI)
        yield pytest.param(name, kind, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["smallest", pytest.param("largest", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("name", "kind"), list(cases()))
def test_an_extreme_value_trains_or_is_refused_with_a_sentence(
    files, pairs, tmp_path, name, kind, end
):
    if end == "largest" and name in TOO_LARGE:
        pytest.skip("bounded by the machine's memory alone")
    for text in (SMALLEST if end == "smallest" else LARGEST)[kind]:
        try:
            config = config_with(files, pairs, {name: text})
            break
        except ConfigError:
            continue
    else:
        pytest.skip("the setting is not one of this objective or optimizer")
    try:
        run(config, tmp_path, StopAfter())
    except Interrupted as stopped:
        assert stopped.exit_code == 143
    except DpojaxError as error:
        # 3: limits that leave no pair; 4: a step to restore that is not there; 5: numbers that
        # training cannot hold.
        assert error.exit_code in (2, 3, 4, 5), error
        assert name.rpartition(".")[2] in str(error) or error.exit_code != 2, error
    finally:
        jax.clear_caches()
