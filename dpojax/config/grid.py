"""Settings with several values -> the configs of a sweep, each by its name."""

import itertools
import re
from collections.abc import Mapping, Sequence

from dpojax.config.load import apply_override, from_config_dict, setting_kinds
from dpojax.config.schema import Config
from dpojax.errors import ConfigError, nearest_setting

MAY_DIFFER = re.compile(r"loss\..*|optim\.learning_rate|seed")


def combinations(
    values, grid: Mapping[str, Sequence[str]], overridden: frozenset[str] = frozenset()
) -> dict[str, Config]:
    """Every combination of the grid's settings: name -> config.

    Raises: ConfigError for a setting that runs of one program cannot differ in.
    """
    for key in grid:
        if not MAY_DIFFER.fullmatch(key):
            near = nearest_setting(key, [k for k in setting_kinds() if MAY_DIFFER.fullmatch(k)])
            near = near.replace("did you mean ", "did you mean --sweep.")
            raise ConfigError(
                f"--sweep.{key}: runs of one program differ in loss.*, optim.learning_rate and seed"
                f" alone{near}"
            )
    runs: dict[str, Config] = {}
    for texts in itertools.product(*grid.values()):
        settings = dict(zip(grid, texts, strict=True))
        run_values = values.copy_and_resolve_references()
        for key, text in settings.items():
            apply_override(run_values, key, text, flag="sweep")
        name = ",".join(f"{key.rpartition('.')[2]}={text}" for key, text in settings.items())
        if name in runs:
            raise ConfigError(f"--sweep: {name} stands there twice")
        runs[name] = from_config_dict(run_values, overridden=overridden | frozenset(grid))
    for name, config in runs.items():
        _check(name, config, "seed" in grid)
    if len({c.loss.objective.unpaired for c in runs.values()}) > 1:
        raise ConfigError(
            "--sweep.loss.name: paired and unpaired objectives take different data; sweep them"
            " apart"
        )
    return runs


def _check(name: str, config: Config, seeds: bool) -> None:
    loss = config.loss.objective
    both = "run it alone with dpojax.main"
    if loss.coupled or loss.moving or loss.needs("kl") or loss.needs("mismatched") or loss.unpaired:
        raise ConfigError(
            f"{name}: {loss.name} couples the pairs of a batch, moves its reference or needs more"
            f" of it; {both}"
        )
    if config.model.router_loss_weight:
        raise ConfigError(
            f"{name}: model.router_loss_weight={config.model.router_loss_weight}: not in a sweep;"
            f" {both}"
        )
    if seeds and (
        not config.lora.rank
        or config.data.seed < 0
        or config.sft.num_steps
        or not config.model.init
    ):
        raise ConfigError(
            "--sweep.seed: runs share data, SFT stage and reference, so that a seed is that of"
            " adapters: set lora.rank, model.init and --config.data.seed"
        )
