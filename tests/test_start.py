"""How a run starts: what it reads, what its settings mean together, and that a refused run changes nothing."""

import hashlib
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from runs import ROOT, command, losses, rows, run

from dpojax.config import apply_override, from_config_dict, load_config_file, with_limits, with_steps
from dpojax.data import world
from dpojax.data.index import Dataset, build_index
from dpojax.data.records import in_memory
from dpojax.data.sources import open_named, open_sources
from dpojax.data.tokens import Limits
from dpojax.data.triples import RowReader
from dpojax.errors import ConfigError


def configured(file="configs/tldr.py", **changes):
    values = load_config_file(str(ROOT / file))
    for key, value in changes.items():
        apply_override(values, key, str(value))
    return from_config_dict(values, overridden=frozenset(changes))


# --- settings that say the same in two ways -----------------------------------------------------------------------------


def test_what_the_command_line_sets_turns_its_alternative_off():
    assert configured().num_steps == 150
    by_epochs = configured(**{"num_epochs": 2})
    assert (by_epochs.num_steps, by_epochs.num_epochs) == (-1, 2.0)
    assert with_steps(by_epochs, 12.5).num_steps == 25
    by_ratio = configured(**{"optim.warmup_ratio": 0.1})
    assert with_steps(by_ratio, 1.0).optim.warmup_steps == 15
    assert configured(**{"num_epochs": 0}).num_steps == 150
    for both in ({"num_steps": 3, "num_epochs": 1}, {"optim.warmup_steps": 3, "optim.warmup_ratio": 0.1}):
        with pytest.raises(ConfigError, match="while"):
            configured(**both)
    with pytest.raises(ConfigError, match="num_epochs"):
        configured(num_steps=-1)
    settings = {"data.train": "a.jsonl", "data.eval": "b.jsonl", "data.eval_share": 0.1}
    with pytest.raises(ConfigError, match=r"data\.eval_share"):
        configured(**settings)


@pytest.mark.parametrize(
    ("name", "needs"),
    [("orpo", {"loss.orpo_lambda": 0.1}), ("simpo", {"loss.gamma": 1.0}), ("sft", {}), ("ipo", {}), ("kto", {})],
)
def test_an_objective_drops_the_configs_default_settings_that_it_does_not_take(name, needs):
    config = configured(**{"loss.name": name, **needs})
    assert (config.loss.beta is None) == (name in ("orpo", "sft"))
    if config.loss.beta is None:
        with pytest.raises(ConfigError, match=r"loss\.beta"):  # one that was typed is no default
            configured(**{"loss.name": name, **needs, "loss.beta": 0.1})


def test_limits_of_0_are_the_models():
    config = configured(**{"data.max_prompt_tokens": 0, "data.max_response_tokens": 0})
    limits = lambda positions: with_limits(config, positions).data
    assert (limits(512).max_prompt_tokens, limits(512).max_response_tokens) == (256, 256)
    assert (limits(8192).max_prompt_tokens, limits(8192).max_response_tokens) == (512, 512)
    assert with_limits(configured(), 8192).data == configured().data


# --- sources ------------------------------------------------------------------------------------------------------------


def write(path, prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": p, "chosen": "a", "rejected": "b"}) + "\n" for p in prompts))
    return str(path)


def test_several_files_globs_and_folders_are_one_list_of_rows(tmp_path):
    one, two = write(tmp_path / "d/a.jsonl", "xy"), write(tmp_path / "d/b.jsonl", "z")
    (tmp_path / "d/notes.txt").write_text("no data")
    comma = write(tmp_path / "with,comma=1.jsonl", "q")
    for spec in (f"{one},{two}", f"{one}, {two}", str(tmp_path / "d"), str(tmp_path / "d/*.jsonl")):
        records = pickle.loads(pickle.dumps(open_sources(spec)))  # as a worker process gets it
        assert [records.get(i)["prompt"] for i in range(records.size)] == ["x", "y", "z"]
        assert [records.where(i) for i in range(records.size)] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert open_sources(f"{one},{two}").fingerprint != open_sources(f"{two},{one}").fingerprint
    assert open_sources(comma).size == 1  # a path that exists is one path
    records, parts = open_named(f"left={one},right={two}")
    assert [tuple(p) for p in parts] == [("left", 0, 2), ("right", 2, 3)] and records.size == 3
    (tmp_path / "empty").mkdir()
    for spec, says in {
        str(tmp_path / "empty"): "holds no data file",
        str(tmp_path / "*.none"): "no file matches",
        f"a={one},{two}": "name",
        f"a={one},a={two}": "twice",
        f"{one},{tmp_path}/nowhere.jsonl": "nowhere.jsonl",
        ",": "names no file",
    }.items():
        with pytest.raises(ConfigError, match=says):
            open_named(spec)


def test_held_out_prompts_are_whole_and_drawn_by_the_seed():
    made = [
        {"prompt": str(i // 2), "responses": ["a", "b", "c", "d"][: 2 + i % 3], "scores": list(range(2 + i % 3))}
        for i in range(12)
    ]
    data = Dataset(
        in_memory("ranked", made),
        RowReader(""),
        world.make_world(7, num_posts=2000, num_pairs=4, num_eval=4).tokenizer,
        Limits(64, 64),
    )
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    order = np.asarray([3, 0, 5])
    taken = index.select(order)
    for new, old in enumerate(order):
        assert taken.responses(new) == index.responses(old) and taken.pairs(new) == index.pairs(old)
    drawn = index.drawn_prompts(0.25, 0)
    assert 1 <= len(drawn) < len(np.unique(index.prompt_hashes))
    shuffled = index.select(np.arange(len(index.rows))[::-1])
    np.testing.assert_array_equal(np.sort(shuffled.drawn_prompts(0.25, 0)), np.sort(drawn))


# --- a refused run ------------------------------------------------------------------------------------------------------


def content(folder: pathlib.Path) -> dict[str, str]:
    """Every file and folder of a workdir, with what it holds."""
    found = {}
    for place in sorted(folder.rglob("*")):
        found[str(place.relative_to(folder))] = "" if place.is_dir() else hashlib.sha256(place.read_bytes()).hexdigest()
    return found


REFUSALS = {
    "beta": ({"loss.beta": 0.3}, 4),
    "objective": ({"loss.name": "ipo"}, 4),
    "seed": ({"seed": 3}, 4),
    "fewer steps": ({"num_steps": 4}, 4),
    "no steps": ({"num_steps": 0}, 4),
    "step that is not there": ({"checkpoint.restore_step": 3}, 4),
    "batch": ({"batch_size": 16}, 4),
    "lengths": ({"data.max_prompt_tokens": 40}, 4),
    "template": ({"data.prompt_template": "Post: {prompt}"}, 4),
    "model": ({"model.num_layers": 1}, 4),
    "compute": ({"model.dtype": "bfloat16"}, 4),
    "stored dtype": ({"model.param_dtype": "bfloat16"}, 4),
    "optimizer": ({"optim.name": "lion"}, 4),
    "adapters": ({"lora.rank": 2}, 4),
    "flipped labels": ({"data.flip_labels": 0.5}, 4),
    "data": ({"data.train": "eval.jsonl"}, 4),
    "tokenizer": ({"tokenizer": "other/tokenizer.model"}, 4),
    "no such data": ({"data.train": "nowhere.jsonl"}, 2),
    "bad data": ({"data.train": "bad.jsonl"}, 3),
    "no such model": ({"model.init": "nowhere"}, 2),
    "reference": ({"reference.init": "plain"}, 4),
    "SFT stage": ({"sft.num_steps": 2}, 4),
    "mesh": ({"mesh.tensor": 3}, 2),
    "setting": ({"optim.learning_rate": -1}, 2),
}


@pytest.fixture(scope="module")
def finished(plain, files, tmp_path_factory):
    """A copy of a finished run whose report is due again, and files that other runs might take."""
    folder = tmp_path_factory.mktemp("refused")
    shutil.copytree(plain[0], folder / "run")
    (folder / "other").mkdir()
    world.make_world(8, num_posts=2000, num_pairs=4, num_eval=4).tokenizer.save(folder / "other")
    (folder / "bad.jsonl").write_text((files / "train.jsonl").read_text() + '{"prompt": 1}\n')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_run_leaves_every_byte_of_the_workdir_as_it_was(finished, plain, files, name, capsys):
    from dpojax.main import main

    changes, code = REFUSALS[name]
    places = {
        "eval.jsonl": files / "eval.jsonl",
        "bad.jsonl": finished / "bad.jsonl",
        "other/tokenizer.model": finished / "other/tokenizer.model",
        "plain": plain[0],
    }
    changes = {key: places.get(value, value) for key, value in changes.items()}
    before = content(finished / "run")
    assert main(command(files, finished / "run", **changes)[3:]) == code, capsys.readouterr()
    after = content(finished / "run")
    assert {k for k in before | after if before.get(k) != after.get(k)} == set()
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_refused_start_leaves_an_unfinished_run_as_it_was(files, tmp_path, capsys):
    """The same where the first run had an SFT stage, and its workdir holds no checkpoint of the preference stage."""
    from dpojax.main import main

    settings = {"sft.num_steps": 2, "num_steps": 2, "mesh.data": 1, "mesh.fsdp": 1}
    run(files, tmp_path / "w", **settings)
    shutil.rmtree(tmp_path / "w/checkpoints")
    before = content(tmp_path / "w")
    for changes in ({"sft.learning_rate": 1e-2}, {"sft.num_steps": 1}, {"seed": 1}, {"data.max_response_tokens": 9}):
        argv = command(files, tmp_path / "w", **{**settings, "mesh.data": -1, **changes})[3:]
        assert main(argv) == 4, changes
        after = content(tmp_path / "w")
        assert {k for k in before | after if before.get(k) != after.get(k)} == set(), changes


# --- runs of other kinds ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_epochs_a_held_out_share_and_no_held_out_pairs_at_all(files, tmp_path):
    settings = {"num_steps": None, "num_epochs": 0.5, "data.eval": None, "data.eval_share": 0.25}
    output = run(files, tmp_path / "share", **settings)
    assert "held out: " in output and "0.5 epochs" in output
    steps = json.loads((tmp_path / "share/summary.json").read_text())["num_steps"]
    assert steps == 3 == max(r["step"] for r in rows(tmp_path / "share"))
    run(files, tmp_path / "none", **{"data.eval": None, "num_steps": 2})
    assert all("eval_loss" not in r for r in rows(tmp_path / "none")) and (tmp_path / "none/report.html").is_file()


@pytest.mark.slow
def test_named_held_out_sets_are_logged_apart_and_together(files, plain, tmp_path):
    half = tmp_path / "half.jsonl"
    half.write_text("".join((files / "eval.jsonl").read_text().splitlines(keepends=True)[:5]))
    run(files, tmp_path / "w", **{"data.eval": f"all={files / 'eval.jsonl'},half={half}"})
    summary, before = (json.loads((w / "summary.json").read_text()) for w in (tmp_path / "w", plain[0]))
    assert summary["eval_all_loss"] == pytest.approx(before["eval_loss"], abs=1e-5)
    assert summary["eval_half_rewards/margins"] != summary["eval_all_rewards/margins"]
    assert summary["eval_loss"] == pytest.approx((16 * summary["eval_all_loss"] + 5 * summary["eval_half_loss"]) / 21)


@pytest.mark.slow
def test_sft_alone_and_evaluation_alone(files, plain, tmp_path):
    completions = tmp_path / "sft.jsonl"
    lines = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    completions.write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in lines))
    sft = {"num_steps": 0, "sft.num_steps": 3, "data.train": completions, "data.eval": None, "export": True}
    run(files, tmp_path / "sft", **sft)
    assert json.loads((tmp_path / "sft/summary.json").read_text())["sft_loss"] > 0
    assert (tmp_path / "sft/export/config.json").is_file()
    evaluation = {"num_steps": 0, "model.init": plain[0], "data.train": None, "tokenizer": ""}
    sizes = dict.fromkeys(("model.hidden_size", "model.intermediate_size", "model.head_dim"))
    run(files, tmp_path / "eval", **evaluation, **sizes, **{"reference.init": tmp_path / "sft"})
    summary, before = (json.loads((w / "summary.json").read_text()) for w in (tmp_path / "eval", plain[0]))
    assert summary["eval_logps/chosen"] == pytest.approx(before["eval_logps/chosen"], abs=1e-3)
    assert summary["num_steps"] == 0 and len(losses(tmp_path / "eval")) == 0
