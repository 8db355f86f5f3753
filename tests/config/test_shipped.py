"""The configs that come with dpojax: their values, found by name and by path, in a checkout and in
an installation.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest
from runs import ROOT

from dpojax.config import shipped
from dpojax.config.load import from_config_dict, load_config_file
from dpojax.errors import ConfigError

# Settings of every shipped config before they were built on base.py: all of tldr's, and where the
# others differ from them. A path is its last part here.
FROZEN = json.loads((ROOT / "tests/oracles/frozen/configs.json").read_text())


def flat(values, prefix=""):
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


@pytest.mark.parametrize("spec", FROZEN)
def test_a_shipped_config_has_the_values_that_it_had(spec):
    """A setting that is new since then is free."""
    values = flat(load_config_file(spec).to_dict())
    if values["model.shape"]:
        assert pathlib.Path(values["model.shape"]).is_file()
        values["model.shape"] = pathlib.Path(values["model.shape"]).name
    expected = FROZEN["tldr"] | FROZEN[spec]
    assert {key: values[key] for key in expected} == expected


def test_every_shipped_config_is_frozen_and_base_holds_their_settings():
    frozen = {spec.partition(":")[0] for spec in FROZEN}
    assert frozen | {"base"} == set(shipped.shipped_names())
    base = flat(load_config_file("base").to_dict())
    assert all(set(flat(load_config_file(spec).to_dict())) >= set(base) for spec in FROZEN)
    assert from_config_dict(load_config_file("base")).num_epochs == 1


def test_a_name_is_the_file_and_goes_before_a_folder_of_that_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tldr").mkdir()
    by_name = load_config_file("tldr:paper")
    assert by_name == load_config_file(f"{ROOT / 'configs/tldr.py'}:paper")


@pytest.mark.parametrize(
    ("spec", "answer"),
    [
        ("tdlr", "did you mean tldr?"),
        ("recipe:zephyr", "did you mean recipes?"),
        ("mine", "did you mean mine.py?"),
        ("configs/tldr.py", "did you mean tldr?"),
        ("nothing_like_it", "there are base, dpo, hh,"),
        ("base:paper", "'base' takes no argument"),
    ],
)
def test_what_is_not_there_is_answered_with_the_nearest_outside_a_checkout(
    spec, answer, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_config_file(spec)
    assert answer in str(caught.value)


def test_the_distribution_holds_every_room_and_the_configs():
    """Setuptools finds packages by itself only where a folder has its package's name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = subprocess.run(
        ["git", "ls-files", "dpojax"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    rooms = {str(pathlib.Path(file).parent).replace("/", ".") for file in files}
    assert rooms <= {*settings["packages"]}
    assert settings["package-dir"] == {"dpojax.configs": "configs"}
    assert "dpojax.configs" in settings["packages"]


def test_an_installation_finds_the_configs_by_name(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed: it builds the wheel")
    source = tmp_path / "source"
    keep = shutil.ignore_patterns(".git", "build", "*.egg-info", "runs", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=keep)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q"]
    site = tmp_path / "site"
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True, timeout=300)
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import dpojax, sys; from dpojax.config.load import load_config_file as load;"
        " from dpojax.configs import tldr;"
        " assert load('tldr:paper') == tldr.get_config('paper'); print(dpojax.__file__);"
        " print(load('llama3_8b:v6e').model.shape); assert not [p for p in sys.path if"
        " p.endswith('dpojax')], sys.path"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, shape = done.stdout.split()
    assert pathlib.Path(package).is_relative_to(site) and pathlib.Path(shape).is_relative_to(site)
    assert json.loads(pathlib.Path(shape).read_text())["hidden_size"] == 4096


# Samples and prompts of a step, beta, where the KL goes, rate, clips, tokens of a response: the
# papers' tables and the authors' scripts.
ONLINE = {
    "instructgpt": (1, 64, 0.02, "reward", 5e-6, (0.2, 0.2), 1024),
    "deepseekmath": (64, 16, 0.04, "loss_k3", 1e-6, (0.2, 0.2), 1024),
    "dapo": (16, 32, 0.0, "reward", 1e-6, (0.2, 0.28), 20480),
    "tulu31": (16, 48, 0.01, "loss_k3", 5e-7, (0.2, 0.2), 2048),
    "olmo3": (8, 64, 0.0, "reward", 1e-6, (0.2, 0.272), 32768),
}


@pytest.mark.parametrize("name", ONLINE)
def test_recipes_of_policy_gradients_are_the_published_settings(name):
    values = load_config_file(f"recipes:{name}")
    values.data.train = "prompts.jsonl"
    values.model.init = "model"
    config = from_config_dict(values)
    section = config.policy_gradient
    loss = section.loss(config.sample.max_new_tokens).settings
    found = (section.num_samples, config.batch_size, loss.beta, loss.kl)
    found = (*found, config.optim.learning_rate, (loss.clip_low, loss.clip_high))
    assert (*found, config.sample.max_new_tokens) == ONLINE[name]
    assert config.optim.schedule == "constant"


def test_the_recipe_of_online_dpo_compares_two_samples_by_their_larger_reward():
    values = load_config_file("recipes:oaif")
    values.data.train = "prompts.jsonl"
    values.model.init = "model"
    config = from_config_dict(values)
    section = config.online_dpo
    assert (section.num_samples, section.labels, section.temperature) == (2, "argmax", 0.9)
    assert (config.loss.beta, config.batch_size, config.optim.name) == (0.1, 128, "adafactor")
