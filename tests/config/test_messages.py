"""Every ConfigError of settings and command lines: it names its field, lists something where it
lists, and contradicts nothing.
"""

import ast
import inspect
import pathlib
import re
import traceback

import pytest
from messages import faults
from runs import ROOT

from dpojax import main, sweep
from dpojax.config import load, rules
from dpojax.config.load import apply_override, from_config_dict, load_config_file, setting_kinds
from dpojax.config.schema import setting_choices
from dpojax.config.training import OPTIMIZERS
from dpojax.errors import ConfigError
from dpojax.objectives import loss
from dpojax.objectives.loss import make_loss
from dpojax.objectives.settings import ALIASES, RANGES, SHORTHANDS
from dpojax.objectives.table import OBJECTIVES

VALID = {  # one legal value of every setting of an objective
    "beta": 0.1,
    "label_smoothing": 0.1,
    "average": True,
    "tau": 0.5,
    "gamma": 0.1,
    "alpha": 0.5,
    "dpop_lambda": 5.0,
    "orpo_lambda": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "f_divergence": "js",
    "f_alpha": 0.5,
    "sft_weight": 0.2,
    "sft_normalize": "pair",
}
LORA = {"lora.rank": "4"}
OWN_DATA = {"data.train": "t.jsonl", "data.eval": "e.jsonl"}
# What is set on the command line -> the field that the message must name.
SETTINGS = [
    *[
        ({key: "nonsense"}, key)
        for key in setting_choices()
        if key not in ("loss.f_divergence", "loss.sft_normalize")
    ],
    *[({key: "many"}, key) for key, kind in setting_kinds().items() if kind in (int, float, bool)],
    *[
        ({key: "-7"}, key)
        for key in (
            "seed",
            "batch_size",
            "num_steps",
            "data.row_tokens",
            "sample.top_k",
            "checkpoint.keep",
        )
    ],
    *[
        ({key: "nan"}, key)
        for key in (
            "optim.learning_rate",
            "optim.weight_decay",
            "optim.clip_norm",
            "optim.spike_factor",
        )
    ],
    *[
        ({key: "nan"}, key)
        for key in ("data.flip_labels", "data.max_bad_share", "sample.temperature", "sample.top_p")
    ],
    *[
        ({key: "-0.5"}, key)
        for key in (
            "optim.learning_rate",
            "optim.weight_decay",
            "optim.clip_norm",
            "sample.temperature",
        )
    ],
    *[
        ({key: "-0.5"}, key)
        for key in (
            "data.flip_labels",
            "data.eval_share",
            "optim.warmup_ratio",
            "data.max_bad_share",
        )
    ],
    ({"optim.spike_factor": "1"}, "optim.spike_factor"),
    ({"sample.top_p": "0"}, "sample.top_p"),
    ({"data.max_prompt_tokens": "1"}, "data.max_prompt_tokens"),
    ({"num_epochs": "-1", "num_steps": "-1"}, "num_epochs"),
    ({"num_epochs": "0", "num_steps": "-1"}, "num_epochs"),
    ({"num_epochs": "2", "num_steps": "10"}, "num_steps"),
    ({"optim.warmup_ratio": "0.1", "optim.warmup_steps": "10"}, "optim.warmup_steps"),
    ({"sft.learning_rate": "0"}, "sft.learning_rate"),
    ({"optim.b1": "2"}, "optim.b1"),
    ({"optim.eps": "0"}, "optim.eps"),
    *[
        ({"optim.name": name, f"optim.{k}": "0.5"}, k)
        for name, own in OPTIMIZERS.items()
        for k in ("b1", "b2", "eps")
        if k not in own
    ],
    ({"checkpoint.allow_changed": "nonsense"}, "checkpoint.allow_changed"),
    ({"mesh.rules.nonsense": "fsdp"}, "mesh.rules.nonsense"),
    ({"reference.rules.nonsense": "fsdp"}, "reference.rules.nonsense"),
    ({"data.prompt_template": "{x}"}, "data.prompt_template"),
    ({"model.hidden_size": "None"}, "model.hidden_size"),
    ({"model.init_std": "0"}, "model.init_std"),
    ({**OWN_DATA, "model.init": "m", "model.hidden_size": "64"}, "model.hidden_size"),
    ({**OWN_DATA, "model.init": "m", "model.shape": "s"}, "model.shape"),
    ({"model.init": "m"}, "model.init"),
    ({"tokenizer": "t"}, "tokenizer"),
    ({"sft.data": "t"}, "sft.data"),
    ({"data.eval": "e"}, "data.eval"),
    ({"data.eval_share": "0.1"}, "data.eval_share"),
    ({**OWN_DATA, "data.eval_share": "0.1"}, "data.eval_share"),
    ({"data.eval": "e", "num_steps": "0", "sft.num_steps": "2"}, "sft.num_steps"),
    ({"num_steps": "2", "num_epochs": "1"}, "num_epochs"),
    ({"num_steps": "-1"}, "num_epochs"),
    ({"optim.warmup_steps": "2", "optim.warmup_ratio": "0.1"}, "optim.warmup_ratio"),
    ({"data.max_prompt_tokens": "1"}, "data.max_prompt_tokens"),
    ({"reference.mode": "none"}, "reference.mode"),
    ({"reference.mode": "adapter"}, "reference.mode"),
    ({"reference.mode": "none", "reference.init": "m"}, "reference.init"),
    ({"lora.base_dtype": "nf4"}, "lora.base_dtype"),
    ({"model.router_loss_weight": "-1"}, "model.router_loss_weight"),
    ({**LORA, "lora.alpha": "0"}, "lora.alpha"),
    ({**LORA, "lora.dropout": "1"}, "lora.dropout"),
    ({**LORA, "reference.dtype": "int8"}, "reference.dtype"),
    ({**LORA, "reference.memory": "pinned_host"}, "reference.memory"),
    ({**LORA, "reference.rules.embed": "fsdp"}, "reference.rules"),
    ({**LORA, "loss.name": "tr_dpo", "loss.alpha": "0.6", "loss.tau": "2"}, "lora.rank"),
    (
        {"loss.name": "tr_dpo", "loss.alpha": "0.6", "loss.tau": "2", "reference.dtype": "int8"},
        "reference.dtype",
    ),
    (
        {
            "loss.name": "tr_dpo",
            "loss.alpha": "0.6",
            "loss.tau": "2",
            "reference.memory": "pinned_host",
        },
        "reference.memory",
    ),
    ({"loss.name": "tdpo1", "reference.mode": "cached"}, "reference.mode"),
    ({"loss.name": "odpo", "loss.alpha": "1", "data.flip_labels": "0.1"}, "data.flip_labels"),
    ({"nonsense": "1"}, "nonsense"),
    ({"nonsense.beta": "1"}, "nonsense"),
    ({"loss": "1"}, "loss"),
    ({"loss.extra": "1"}, "loss.extra"),
    ({"loss.extra.": "1"}, "loss.extra"),
    ({"loss.beta.more": "1"}, "loss.beta"),
    ({"loss.extra.kappa": "1"}, "loss.extra.kappa"),
    ({"loss.extra.beta": "1"}, "loss.extra.beta"),
    ({"loss.name": "nonsense"}, "loss.name"),
    ({"loss.name": "nowhere:nothing"}, "loss.name"),
    ({"loss.name": "-1*sigmoid"}, "loss.name"),
    ({"loss.name": "x*sigmoid"}, "loss.name"),
    ({"loss.name": "0.5*sigmoid+0.5*kto"}, "loss.name"),
    ({"loss.name": "tr_dpo+tdpo1", "loss.alpha": "0.6", "loss.tau": "2"}, "loss.name"),
    ({"loss.name": "cpo+r_dpo", "loss.alpha": "0.6"}, "loss.alpha"),
    ({"loss.beta": "None"}, "loss.beta"),
    ({"loss.beta": "-1"}, "loss.beta"),
    ({"loss.name": "discopop", "loss.tau": "2"}, "loss.tau"),
    ({"loss.f_divergence": "alpha"}, "loss.f_alpha"),
    ({"loss.f_alpha": "1"}, "loss.f_alpha"),
    ({"loss.sft_normalize": "pair"}, "loss.sft_normalize"),
]
DATA = [  # what a .json config may hold
    ({}, "missing"),
    ({"seed": 0, "nonsense": 1}, "nonsense"),
    ({"data": 3}, "data"),
    ({"export": "x"}, "export"),
    ({"tokenizer": "a\0b"}, "tokenizer"),
    ({"mesh": {"rules": 3}}, "rules"),
    ({"loss": {"extra": {"x": "y"}}}, "loss.extra.x"),
    ([], "JSON object"),
]
COMMANDS = [
    (main, [], "--config"),
    (main, ["nonsense"], "nonsense"),
    (main, ["--workdir"], "--workdir"),
    (main, ["--nonsense=1"], "--nonsense"),
    (main, ["--config=x.py", "--profile=0"], "--profile"),
    (main, ["--config=nowhere.py"], "nowhere.py"),
    (main, ["--config=configs/tldr.py:nonsense"], "nonsense"),
    (main, ["--config=configs/tldr.py", "--workdir="], "--workdir"),
    (main, ["--config=configs/tldr.py", "--workdir=/proc/nowhere"], "--workdir"),
    (sweep, ["--nonsense=1"], "--nonsense"),
    (sweep, ["nonsense"], "nonsense"),
    (sweep, ["--together=nonsense"], "--together"),
    (sweep, ["--config=configs/tldr.py"], "--sweep"),
    (sweep, ["--config=configs/tldr.py", "--sweep.batch_size=1,2"], "batch_size"),
    (sweep, ["--config=configs/tldr.py", "--sweep.loss.beta=1,1"], "beta=1"),
    (sweep, ["--config=configs/tldr.py", "--sweep.loss.bta=1"], "--sweep.loss.bta=1"),
    (sweep, ["--config=configs/tldr.py", "--sweep.loss.name=kto,sigmoid"], "kto"),
    (sweep, ["--config=configs/tldr.py", "--sweep.seed=1,2"], "--sweep.seed"),
    (
        sweep,
        [
            "--config=configs/tldr.py",
            "--sweep.loss.beta=1",
            "--config.model.router_loss_weight=0.1",
        ],
        "router_loss_weight",
    ),
]


def raised(function, sites):
    """The message of the ConfigError that a call raises; notes the lines that it came by."""
    with pytest.raises(ConfigError) as caught:
        function()
    error = caught.value
    while error is not None:
        sites.update(
            (pathlib.Path(f.filename).name, f.lineno)
            for f in traceback.extract_tb(error.__traceback__)
        )
        error = error.__cause__
    return str(caught.value)


def configured(changes):
    values = load_config_file(str(ROOT / "configs/tldr.py"))
    for key, text in changes.items():
        apply_override(values, key, text)
    return from_config_dict(values, overridden=frozenset(changes))


def tree(part):
    """A whole config as plain data, with a part of it exchanged."""
    values = load_config_file(str(ROOT / "configs/tldr.py")).to_dict()
    if not part:
        del values["seed"]
    for key, value in part.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return values


def raise_sites(module):
    """The (first, last) lines of every statement of a module that raises a ConfigError, by itself
    or by `_require`.
    """
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Raise | ast.Call) and ast.unparse(node).startswith(
            ("raise ConfigError", "raise ValueError(f", "_require(", "_check_range(")
        ):
            found.append((node.lineno, node.end_lineno))
    return found


def test_every_config_error_names_its_field_and_lists_something(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    sites = set()
    messages = [
        (names, raised(lambda c=changes: configured(c), sites)) for changes, names in SETTINGS
    ]
    for part, names in DATA:
        values = part if isinstance(part, list) else tree(part)
        if isinstance(values, dict):
            messages.append((names, raised(lambda v=values: from_config_dict(v), sites)))
    files = {"list.json": "[]", "text.json": "{", "dots.json": '{"a.b": 1}', "bad.py": "1 / 0"}
    files["code.json"] = '{"loss": {"name": "mine.py:loss"}}'
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        messages.append((name, raised(lambda n=name: load_config_file(str(tmp_path / n)), sites)))
    for module, argv, names in COMMANDS:
        assert module.main(argv) == 2, argv
        messages.append((names, capsys.readouterr().err))
    for names, text in messages:
        assert names in text, (names, text)
        assert not faults(text), (faults(text), text)
    # The table walks the kind: nearly all that these modules can raise. (A few need several
    # processes, or are caught earlier.)
    for module in (load, rules, loss):
        name = pathlib.Path(module.__file__ or "").name
        everything = raise_sites(module)
        missed = [
            site
            for site in everything
            if not any(f == name and site[0] <= n <= site[1] for f, n in sites)
        ]
        assert len(missed) <= len(everything) // 4, (
            f"{name}: nothing in the table raises the errors of lines {missed}"
        )


@pytest.mark.parametrize(
    "name", [*OBJECTIVES, *SHORTHANDS, *ALIASES, "sigmoid+0.2*sft", "0.5*ipo+0.5*hinge"]
)
def test_what_an_objective_says_it_takes_it_takes_and_nothing_else(name):
    """Every setting alone: it is taken, or the list that the message gives is right to the last
    name.
    """
    needed = {}
    for _ in range(5):  # add what is missing, as the messages say
        try:
            make_loss(name, **needed)
            break
        except ValueError as error:
            key = re.match(r"loss\.(\w+) is not set", str(error))[1]
            needed[key] = VALID[key]
            if name == "tr_dpo" or name.startswith("tr_"):
                needed |= {"tau": 2.0} if key == "tau" else {}
    for key in RANGES:
        if key in needed:
            continue
        together = {"f_alpha": {"f_divergence": "alpha"}, "sft_normalize": {"sft_weight": 0.2}}.get(
            key, {}
        )
        try:
            make_loss(name, **(needed | {key: VALID[key]}))
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"loss.{key} is ") and not faults(text), text
            listed = re.search(r"takes only ([\w, ]+);", text)
            takes = listed[1].split(", ") if listed else []
            assert key not in takes
            if "only goes with" in text:
                make_loss(name, **(needed | together | {key: VALID[key]}))
                continue
            for other in takes:
                value = "reverse_kl" if other == "f_divergence" else VALID[other]
                make_loss(name, **(needed | {other: needed.get(other, value)}))
