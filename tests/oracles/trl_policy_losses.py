"""TRL's policy-gradient and reward losses on given log-probs, in float64:
python tests/oracles/trl_policy_losses.py OUT.json.

Runs the loss methods of GRPOTrainer, RLOOTrainer and RewardTrainer on a stand-in for a model that
returns these numbers, and stores values and gradients. The advantages are computed with TRL's own
`nanstd` and its formulas, which stand inside its sampling. Shares no code with dpojax.
"""

import collections
import contextlib
import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import torch
from trl import GRPOTrainer, RewardTrainer, RLOOTrainer
from trl.trainer.utils import nanstd

GROUPS, SAMPLES, TOKENS = 3, 4, 6
MAX_TOKENS = 16

# label: (dpojax's preset, dpojax's settings, TRL's settings, TRL's scale_rewards)
GRPO = {
    "grpo": (
        "grpo",
        {"beta": 0.04},
        {"beta": 0.04},
        "group",
    ),
    "grpo without KL": ("grpo", {"beta": 0.0}, {}, "group"),
    "grpo, k3 times the ratio": (
        "grpo",
        {"beta": 0.04, "kl": "loss_k3_ratio"},
        {"beta": 0.04, "use_bias_correction_kl": True},
        "group",
    ),
    "bnpo": (
        "grpo",
        {"beta": 0.04, "aggregate": "token"},
        {"beta": 0.04, "loss_type": "bnpo"},
        "group",
    ),
    "dr_grpo": (
        "dr_grpo",
        {"max_tokens": MAX_TOKENS},
        {"loss_type": "dr_grpo"},
        "none",
    ),
    "dr_grpo with k3": (
        "dr_grpo",
        {"max_tokens": MAX_TOKENS, "beta": 0.1, "kl": "loss_k3"},
        {"loss_type": "dr_grpo", "beta": 0.1},
        "none",
    ),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}, "group"),
    "dapo, scaled by the step": (
        "dapo",
        {"scale": "step"},
        {"loss_type": "dapo", "epsilon_high": 0.28},
        "batch",
    ),
    "gspo": (
        "gspo",
        {},
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        "group",
    ),
    "gspo, wider, with k3 times the ratio": (
        "gspo",
        {"clip_low": 0.1, "clip_high": 0.1, "beta": 0.04, "kl": "loss_k3_ratio"},
        {
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.1,
            "epsilon_high": 0.1,
            "beta": 0.04,
            "use_bias_correction_kl": True,
        },
        "group",
    ),
}

RLOO = {"rloo": {"beta": 0.05}, "rloo without KL": {"beta": 0.0}}

REWARD = {
    "plain": {"margin": False, "centring": None},
    "margin": {"margin": True, "centring": None},
    "centred": {"margin": True, "centring": 0.01},
}


def make_inputs(rng: np.random.Generator) -> dict[str, list]:
    """Token log-probs of the policy, the old policy and the reference; rewards of each response."""
    shape = (GROUPS * SAMPLES, TOKENS)
    logps = -rng.gamma(1.5, 0.8, shape)
    old = np.minimum(logps + rng.normal(0, 0.25, shape), -1e-3)
    ref = np.minimum(logps + rng.normal(0, 0.3, shape), -1e-3)
    lengths = rng.integers(1, TOKENS + 1, shape[0])
    rewards = rng.normal(0, 1, shape[0])
    rewards[-SAMPLES:] = 0.3  # a group that has nothing to teach
    return {
        "logps": logps.tolist(),
        "old_logps": old.tolist(),
        "ref_logps": ref.tolist(),
        "mask": (np.arange(TOKENS) < lengths[:, None]).tolist(),
        "rewards": rewards.tolist(),
        "group": np.repeat(np.arange(GROUPS), SAMPLES).tolist(),
        "margin": rng.uniform(0, 1, shape[0] // 2).tolist(),
    }


class Accelerator:
    """One process."""

    device = "cpu"
    num_processes = 1
    gather = gather_for_metrics = staticmethod(lambda x: x)

    @staticmethod
    def reduce(x, reduction="sum"):
        return x


def trainer(logps: torch.Tensor, **settings) -> SimpleNamespace:
    """What the loss methods read of a trainer."""
    arguments = dict(
        use_bias_correction_kl=settings.pop("use_bias_correction_kl", False),
        delta=None,
        steps_per_generation=1,
        center_rewards_coefficient=settings.pop("centring", None),
    )
    defaults = dict(
        accelerator=Accelerator(),
        args=SimpleNamespace(**arguments),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        loss_type="grpo",
        max_completion_length=MAX_TOKENS,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    return SimpleNamespace(**{**defaults, **settings})


def tensors(inputs: dict[str, list]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(inputs[name], dtype=torch.float64)
        for name in ("logps", "old_logps", "ref_logps", "mask", "rewards", "margin")
    }


def grouped_advantages(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """As GRPOTrainer._generate_and_score_completions, multi_objective sum_then_normalize."""
    groups = rewards.view(-1, SAMPLES)
    mean = torch.nanmean(groups, dim=1).repeat_interleave(SAMPLES, dim=0)
    advantages = rewards - mean
    if scale == "none":
        return advantages
    if scale == "group":
        std = nanstd(groups, dim=1).repeat_interleave(SAMPLES, dim=0)
    else:
        std = nanstd(rewards).expand_as(rewards)
    return advantages / (std + 1e-4)


def result(loss: torch.Tensor, leaf: torch.Tensor, advantages: torch.Tensor | None) -> dict:
    loss.backward()
    assert leaf.grad is not None
    values = {"loss": loss.item(), "gradient": leaf.grad.tolist()}
    if advantages is not None:
        values["advantages"] = advantages.tolist()
    return values


def run_grpo(inputs: dict[str, list], settings: dict, scale: str) -> dict:
    t = tensors(inputs)
    logps = t["logps"].requires_grad_()
    advantages = grouped_advantages(t["rewards"], scale)
    mask = t["mask"].long()
    batch = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": t["old_logps"],
        "ref_per_token_logps": t["ref_logps"],
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer(logps, **settings), None, batch)
    return result(loss, logps, advantages)


def run_rloo(inputs: dict[str, list], settings: dict) -> dict:
    t = tensors(inputs)
    logps = t["logps"].requires_grad_()
    mask = t["mask"].long()
    kl = ((t["old_logps"] - t["ref_logps"]) * mask).sum(-1)
    rewards = t["rewards"] - settings["beta"] * kl
    groups = rewards.view(-1, SAMPLES)
    baselines = (groups.sum(dim=1, keepdim=True) - groups) / (SAMPLES - 1)
    advantages = rewards - baselines.view(-1)
    batch = {
        "prompt_ids": mask[:, :1],
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "old_logps": (t["old_logps"] * mask).sum(1),
    }
    loss = RLOOTrainer._compute_loss(trainer(logps, **settings), None, batch)
    return result(loss, logps, advantages)


def run_reward(inputs: dict[str, list], margin: bool, centring: float | None) -> dict:
    """The rewards of the first half are the chosen responses', in TRL's order."""
    t = tensors(inputs)
    rewards = t["rewards"].requires_grad_()
    batch = {"attention_mask": torch.ones(2)}
    if margin:
        batch["margin"] = t["margin"]

    def model(**kwargs):
        return SimpleNamespace(logits=rewards[:, None])

    stand_in = trainer(rewards, centring=centring)
    return result(RewardTrainer.compute_loss(stand_in, model, batch), rewards, None)


def main(out: str) -> None:
    inputs = make_inputs(np.random.default_rng(17))
    losses: dict[str, dict] = {}
    with contextlib.redirect_stdout(sys.stderr):
        for label, (preset, settings, theirs, scale) in GRPO.items():
            losses[label] = {
                "preset": preset,
                "settings": settings,
                **run_grpo(inputs, dict(theirs), scale),
            }
        for label, settings in RLOO.items():
            losses[label] = {
                "preset": "rloo",
                "settings": settings,
                **run_rloo(inputs, dict(settings)),
            }
        reward = {label: {**case, **run_reward(inputs, **case)} for label, case in REWARD.items()}
    made = "TRL 1.16.0, torch 2.13.0 (CPU): python tests/oracles/trl_policy_losses.py OUT.json"
    pathlib.Path(out).write_text(
        json.dumps({"made_with": made, "inputs": inputs, "losses": losses, "reward": reward}) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
