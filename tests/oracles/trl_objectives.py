"""TRL's own losses on given token log-probs, in float64: python tests/oracles/trl_objectives.py OUT.json.

Runs DPOTrainer, KTOTrainer, CPOTrainer and ORPOTrainer's loss methods on a stand-in for a model
that returns these log-probs, and stores values and gradients with respect to every token's
log-prob. Shares no code with dpojax.
"""

import collections
import contextlib
import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS = 8

# label: (dpojax's name, dpojax's settings, TRL's settings)
DPO = {
    "sigmoid": ("sigmoid", {"beta": 0.1}, {}),
    "sigmoid beta .5": ("sigmoid", {"beta": 0.5}, {"beta": 0.5}),
    "hinge": ("hinge", {"beta": 0.05}, {"beta": 0.05}),
    "ipo": ("ipo", {"beta": 0.1}, {}),
    "exo_pair": ("exo_pair", {"beta": 0.1, "label_smoothing": 1e-3}, {"label_smoothing": 1e-3}),
    "nca_pair": ("nca_pair", {"beta": 0.01}, {"beta": 0.01}),
    "robust": ("robust", {"beta": 0.1, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "bco_pair": ("bco_pair", {"beta": 0.01}, {"beta": 0.01}),
    "sppo_hard": ("sppo_hard", {"beta": 0.001}, {"beta": 0.001}),
    "aot": ("aot", {"beta": 0.01}, {"beta": 0.01}),
    "aot smoothed": ("aot", {"beta": 0.1, "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "aot_unpaired": (
        "aot_unpaired",
        {"beta": 0.1, "label_smoothing": 0.1},
        {"label_smoothing": 0.1},
    ),
    "apo_zero": ("apo_zero", {"beta": 0.1}, {}),
    "apo_down": ("apo_down", {"beta": 0.1}, {}),
    "discopop": ("discopop", {"beta": 0.05, "tau": 0.05}, {"beta": 0.05}),
    "sft": ("sft", {}, {}),
    "sigmoid_norm": ("sigmoid_norm", {"beta": 5.0}, {"beta": 5.0}),
    "ld_dpo": ("ld_dpo", {"beta": 0.1, "alpha": 0.5}, {"loss_types": ["sigmoid"], "ld_alpha": 0.5}),
    "wpo": ("wpo", {"beta": 0.5}, {"loss_types": ["sigmoid"], "beta": 0.5, "use_weighting": True}),
    "wpo*ipo": (
        "wpo*ipo",
        {"beta": 0.5},
        {"loss_types": ["ipo"], "beta": 0.5, "use_weighting": True},
    ),
    "mpo": (
        "mpo",
        {"beta": 0.1},
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    "sigmoid + .2 sft": (
        "sigmoid",
        {"beta": 1.0, "sft_weight": 0.2},
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "beta": 1.0},
    ),
}
DIFFERENCES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


def with_divergences() -> dict[str, tuple[str, dict, dict]]:
    found = dict(DPO)
    for label in DIFFERENCES:
        name, own, theirs = DPO[label]
        for ours, trl in DIVERGENCES.items():
            more = {"f_alpha": 0.5} if ours == "alpha" else {}
            found[f"{label}, {ours}"] = (
                name,
                {**own, "f_divergence": ours, **more},
                {**theirs, "f_divergence_type": trl},
            )
    return found


def make_inputs(rng: np.random.Generator) -> dict[str, list]:
    """Token log-probs of PAIRS pairs under policy and reference:
    ragged lists, chosen ones first.
    """
    lengths = rng.integers(1, 13, 2 * PAIRS)
    # The nearer a response is to its reference, the more the f-divergences' values matter.
    policy = [rng.gamma(1.5, 0.8, n) * -1 for n in lengths]
    ref = [p + rng.normal(0, 0.25, len(p)) - 0.02 for p in policy]
    ref = [np.minimum(r, -1e-3) for r in ref]
    squares = [rng.uniform(-4, -0.1, n) for n in lengths]
    return {
        k: [x.tolist() for x in v]
        for k, v in {"policy": policy, "ref": ref, "log_sum_sq": squares}.items()
    }


def padded(rows: list[list[float]], dtype) -> torch.Tensor:
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return out


def mask_of(rows: list[list[float]]) -> torch.Tensor:
    """One prompt token, then the response."""
    return torch.tensor([[0] + [1] * len(r) + [0] * (max(map(len, rows)) - len(r)) for r in rows])


class Accelerator:
    device = "cpu"
    gather = gather_for_metrics = staticmethod(lambda x: x)


class FakeModel:
    """Returns given log-probs, whatever it is asked."""

    # as accelerate asks where PEFT is installed
    training, is_gradient_checkpointing, _modules = True, False, {}

    def __init__(self, logps, squares=None):
        self.logps, self.squares = logps, squares

    def __call__(self, **kwargs):
        zero = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps,
            log_sum_sq_probs=self.squares,
            entropy=zero,
            mean_logits=zero,
            is_top1=zero.bool(),
        )


def trainer(**attributes):
    defaults = dict(
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        beta=0.1,
    )
    return SimpleNamespace(**{**defaults, **attributes})


def ragged(x: torch.Tensor, rows: list[list[float]]) -> list[list[float]]:
    return [[float(f"{v:.12g}") for v in x[i, : len(r)].tolist()] for i, r in enumerate(rows)]


def run_dpo(inputs: dict[str, list], label: str, theirs: dict) -> dict:
    # TRL's alpha divergence knows no float64.
    dtype = (
        torch.float32 if theirs.get("f_divergence_type") == "alpha_divergence" else torch.float64
    )
    policy = padded(inputs["policy"], dtype).requires_grad_()
    model, ref = (
        FakeModel(policy, padded(inputs["log_sum_sq"], dtype)),
        FakeModel(padded(inputs["ref"], dtype)),
    )
    settings = dict(
        label_smoothing=0.0,
        loss_types=[label.split(",")[0].split()[0]],
        loss_weights=[1.0],
        ld_alpha=None,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
    )
    own = trainer(model=model, ref_model=ref, **{**settings, **theirs})
    mask = mask_of(inputs["policy"])
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    loss = DPOTrainer._compute_loss(own, model, batch, False)
    loss.backward()
    return {"loss": loss.item(), "gradient": ragged(policy.grad, inputs["policy"])}


def run_kto(inputs: dict[str, list], loss_type: str, theirs: dict) -> dict:
    """The first half of the responses are the examples, the second
    half their mismatched responses.
    """
    rows, others = inputs["policy"][:PAIRS], inputs["policy"][PAIRS:]
    policy = padded(rows, torch.float64).requires_grad_()
    logps, ref = policy, FakeModel(padded(inputs["ref"][:PAIRS], torch.float64))
    mismatched = [padded(inputs[k][PAIRS:], torch.float64) for k in ("policy", "ref")]
    labels = torch.tensor(inputs["labels"])
    model = FakeModel(logps)
    own = trainer(
        model=model,
        ref_model=ref,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda m, batch: mismatched[0 if m is model else 1].sum(-1),
        **{"desirable_weight": 1.0, "undesirable_weight": 1.0, **theirs},
    )
    mask, other = mask_of(rows), mask_of(others)
    batch = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": labels,
        "KL_input_ids": other,
    }
    loss = KTOTrainer._compute_loss(own, model, batch, False)
    loss.backward()
    return {"loss": loss.item(), "gradient": ragged(policy.grad, rows)}


def run_cpo(inputs: dict[str, list], loss_type: str, theirs: dict) -> dict:
    """CPO with its NLL term as the mean over the chosen tokens; SimPO on means per token."""
    policy = padded(inputs["policy"], torch.float64).requires_grad_()
    sizes = torch.tensor([len(r) for r in inputs["policy"]])
    sums = policy.sum(-1) / (sizes if loss_type == "simpo" else 1)
    own = trainer(
        alpha=0.0, label_smoothing=0.0, loss_type=loss_type, **{"simpo_gamma": 0.5, **theirs}
    )
    losses, _, _ = CPOTrainer.cpo_loss(own, *sums.chunk(2))
    loss = losses.mean()
    if loss_type != "simpo":
        loss = loss + theirs["cpo_alpha"] * -policy[:PAIRS].sum() / sizes[:PAIRS].sum()
    loss.backward()
    return {"loss": loss.item(), "gradient": ragged(policy.grad, inputs["policy"])}


def run_orpo(inputs: dict[str, list]) -> dict:
    """TRL's odds ratio term, which it computes in float32, and the mean log-prob of each chosen
    response (Eq. 3 and 6).
    """
    policy = padded(inputs["policy"], torch.float64).requires_grad_()
    means = policy.sum(-1) / torch.tensor([len(r) for r in inputs["policy"]])
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(), *means.chunk(2))
    loss = -means[:PAIRS].mean() - losses.mean()
    loss.backward()
    return {"loss": loss.item(), "gradient": ragged(policy.grad, inputs["policy"])}


def main(out: str) -> None:
    inputs = make_inputs(np.random.default_rng(7))
    inputs["labels"] = [True, False, True, True, False, False, True, True]
    found = {}
    with contextlib.redirect_stdout(sys.stderr):
        for label, (name, own, theirs) in with_divergences().items():
            found[label] = {"name": name, "settings": own, **run_dpo(inputs, label, theirs)}
        for label, theirs in {
            "kto": {},
            "kto weighted": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
        }.items():
            found[label] = {
                "name": "kto",
                "settings": {"beta": 0.1, **theirs},
                **run_kto(inputs, "kto", theirs),
            }
        unpaired = run_kto(inputs, "apo_zero_unpaired", {})
        found["apo_zero_unpaired"] = {
            "name": "apo_zero_unpaired",
            "settings": {"beta": 0.1},
            **unpaired,
        }
        simpo = run_cpo(inputs, "simpo", {"beta": 2.5, "simpo_gamma": 0.5 * 2.5})
        found["simpo"] = {"name": "simpo", "settings": {"beta": 2.5, "gamma": 0.5 * 2.5}, **simpo}
        cpo = run_cpo(inputs, "sigmoid", {"beta": 1.0, "cpo_alpha": 1.0})
        found["cpo"] = {"name": "cpo", "settings": {"beta": 1.0, "alpha": 1.0}, **cpo}
        found["orpo"] = {"name": "orpo", "settings": {"orpo_lambda": 0.1}, **run_orpo(inputs)}
    made = "TRL 1.16.0, torch 2.13.0 (CPU): python tests/oracles/trl_objectives.py OUT.json"
    pathlib.Path(out).write_text(
        json.dumps({"made_with": made, "inputs": inputs, "losses": found}) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
