"""Command lines: unknown names are answered with the nearest known one, and --help explains every
setting from its field.
"""

import importlib
import re

import pytest
from runs import ROOT

from dpojax.config.explain import describe_settings
from dpojax.config.load import apply_override, from_config_dict, load_config_file, setting_kinds
from dpojax.config.schema import setting_choices
from dpojax.errors import ConfigError, did_you_mean, nearest_setting
from dpojax.main import main
from dpojax.objectives.table import OBJECTIVES


def misspelt(name):
    """A name with its last two letters exchanged, or with its third letter left out where they are
    one letter.
    """
    return name[:-2] + name[-1] + name[-2] if name[-1] != name[-2] else name[:2] + name[3:]


def test_every_misspelt_setting_is_answered_with_the_setting():
    for key in setting_kinds():
        answer = nearest_setting(misspelt(key), setting_kinds())
        short = len(key.rpartition(".")[2]) < 6  # b1 misspelt is as near b2, top_k as near top_p
        assert answer == f"; did you mean {key}?" or (short and answer), (key, answer)
        assert nearest_setting(key.partition(".")[2] or key, setting_kinds())  # without its section


def test_every_misspelt_objective_is_answered_with_an_objective_as_near():
    for name in OBJECTIVES:
        assert did_you_mean(misspelt(name), OBJECTIVES) if len(name) > 3 else True, name


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["--confg=configs/tldr.py"], "did you mean --config?"),
        (["--config=configs/tldr.py", "--wrokdir=x"], "did you mean --workdir?"),
        (["--config=configs/tldr.py", "--loss.beta=0.5"], "did you mean --config.loss.beta?"),
        (["--config=configs/tldr.py", "--batch_size=4"], "did you mean --config.batch_size?"),
        (["--config=configs/tldr.py", "--config.beta=0.5"], "did you mean loss.beta?"),
        (["--config=configs/tldr.py", "--config.los.beta=0.5"], "did you mean loss.beta?"),
        (
            ["--config=configs/tldr.py", "--config.optim.lerning_rate=1"],
            "did you mean optim.learning_rate?",
        ),
        (["--config=configs/tldr.py", "--config.loss.name=sigmod"], "did you mean sigmoid?"),
        (["--config=configs/tldr.py", "--config.model.remat=dot"], "did you mean dots?"),
        (["--config=configs/tldr.py", "--config.optim.name=adam"], "did you mean adamw?"),
        (["--config=configs/tldr.py", "--config.mesh.rules.embd=fsdp"], "did you mean embed?"),
        (
            ["--config=configs/tldr.py", "--config.checkpoint.allow_changed=modle"],
            "did you mean model?",
        ),
        (["--config=configs/tldr.py:papr"], "did you mean paper?"),
        (["--config=configs/tdlr.py"], "did you mean configs/tldr.py?"),
        (["--config=configs/recipes.py:zephir"], "did you mean zephyr?"),
        (["--config=recipes:zephir"], "did you mean zephyr?"),
        (["--config=tdlr"], "did you mean tldr?"),
        (["--config=tldr", "--config.loss.name=dopo"], "did you mean dpo?"),
    ],
)
def test_main_names_the_nearest(argv, answer, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert (
        main([*argv, *([] if any("w" in a[:5] for a in argv) else [f"--workdir={tmp_path}"])]) == 2
    )
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["audit", "convert", "generate", "score", "plan", "sweep"])
def test_every_tool_names_the_nearest_flag(tool, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    needed = {
        "audit": ["--data=x"],
        "convert": ["--model=x", "--out=y"],
        "generate": ["--model=x"],
        "score": ["--model=x", "--data=y"],
        "plan": ["--config=configs/llama3_8b.py", "--topology=v5e:4x4"],
        "sweep": ["--config=configs/tldr.py"],
    }[tool]
    wrong, right = {
        "audit": ("--shwo=1", "--show"),
        "plan": ("--talbe=1", "--table"),
        "sweep": ("--swep.loss.beta=1", "--sweep"),
    }.get(tool, ("--ignore_feilds=a", "--ignore_fields"))
    module = importlib.import_module(f"dpojax.{tool}")
    try:
        code = module.main([*needed, wrong])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and f"did you mean {right}" in capsys.readouterr().err


def test_help_explains_every_setting_from_its_field(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["--config=configs/tldr.py", "--help"]) == 0
    text = capsys.readouterr().out
    for setting in describe_settings():
        assert setting.about, f"{setting.key} has no comment beside its field in config.py"
        assert re.search(rf"^  --config\.{re.escape(setting.key)}=", text, re.MULTILINE), (
            setting.key
        )
    flat = " ".join(text.split())
    for choices in setting_choices().values():
        assert ", ".join(choice or "''" for choice in choices) in flat
    assert "strength of the pull to the reference" in flat
    assert "a whole number: pairs per step" in flat
    assert "--config.optim.warmup_steps=15 a whole number (steps): over which" in flat
    assert "a share, 0 to 1" in flat
    assert ", wpo, dpo: an objective" in flat


def test_help_groups_the_settings_by_section(capsys):
    assert main(["--config=dpo", "--help"]) == 0
    text = capsys.readouterr().out
    sections = ["run", *dict.fromkeys(key.split(".")[0] for key in setting_kinds() if "." in key)]
    parts = re.split(r"^(\w+): [A-Z].*\.$", text, flags=re.MULTILINE)[1:]
    assert parts[::2] == sections
    for section, part in zip(sections, parts[1::2], strict=True):
        keys = re.findall(r"^  --config\.(?:(\w+)\.)?\w+=", part, re.MULTILINE)
        assert set(keys) == {"" if section == "run" else section}, section


def test_help_without_a_config_lists_those_that_there_are(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  tldr +The main job: ", text, re.MULTILINE)
    assert re.search(r"^  base +All settings", text, re.MULTILINE)


def test_a_setting_of_ones_own_function_is_set_on_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(x, *, beta, kappa):\n    return x.h * beta + kappa\n"
    )
    values = load_config_file(str(ROOT / "configs/tldr.py"))
    apply_override(values, "loss.name", f"{tmp_path / 'mine.py'}:mine")
    apply_override(values, "loss.extra.kappa", "0.25")
    assert from_config_dict(values).loss.extra == {"kappa": 0.25}
    with pytest.raises(ConfigError, match=r"loss\.extra\.kappa.*float"):
        apply_override(values, "loss.extra.kappa", "many")
