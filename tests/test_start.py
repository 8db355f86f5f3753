"""How a run starts: what it reads, what its settings mean together, and that a refused run changes
nothing.
"""

import json
import pathlib
import pickle
import shutil
from typing import Any

import numpy as np
import pytest
from runs import ROOT, command, content, losses, rows, run

from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.config.schema import with_limits, with_steps
from dpojax.data import world
from dpojax.data.dataset import Dataset
from dpojax.data.index import build_index
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.data.records import in_memory
from dpojax.data.rows import RowReader
from dpojax.data.sources import open_named, open_sources
from dpojax.data.tokens import Limits
from dpojax.data.written import Writing
from dpojax.errors import ConfigError


def configured(file: Any = "configs/tldr.py", **changes: Any):
    values = load_config_file(str(ROOT / file))
    for key, value in changes.items():
        apply_override(values, key, str(value))
    return from_config_dict(values, overridden=frozenset(changes))


# --- settings that say the same in two ways -------------------------------------------------------


def test_what_the_command_line_sets_turns_its_alternative_off():
    assert configured().num_steps == 150
    by_epochs = configured(**{"num_epochs": 2})
    assert (by_epochs.num_steps, by_epochs.num_epochs) == (-1, 2.0)
    assert with_steps(by_epochs, 12.5).num_steps == 25
    by_ratio = configured(**{"optim.warmup_ratio": 0.1})
    assert with_steps(by_ratio, 1.0).optim.warmup_steps == 15
    assert configured(**{"num_epochs": 0}).num_steps == 150
    for both in (
        {"num_steps": 3, "num_epochs": 1},
        {"optim.warmup_steps": 3, "optim.warmup_ratio": 0.1},
    ):
        with pytest.raises(ConfigError, match="while"):
            configured(**both)
    with pytest.raises(ConfigError, match="num_epochs"):
        configured(num_steps=-1)
    settings = {"data.train": "a.jsonl", "data.eval": "b.jsonl", "data.eval_share": 0.1}
    with pytest.raises(ConfigError, match=r"data\.eval_share"):
        configured(**settings)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("orpo", {"loss.orpo_lambda": 0.1}),
        ("simpo", {"loss.gamma": 1.0}),
        ("sft", {}),
        ("ipo", {}),
        ("kto", {}),
    ],
)
def test_an_objective_drops_the_configs_default_settings_that_it_does_not_take(name, needs):
    config = configured(**{"loss.name": name, **needs})
    assert (config.loss.beta is None) == (name in ("orpo", "sft"))
    if config.loss.beta is None:
        with pytest.raises(ConfigError, match=r"loss\.beta"):  # one that was typed is no default
            configured(**{"loss.name": name, **needs, "loss.beta": 0.1})


def test_a_run_that_says_dpo_is_the_run_that_says_sigmoid():
    assert configured(**{"loss.name": "dpo"}) == configured(**{"loss.name": "sigmoid"})
    assert configured(**{"loss.name": "dpo+0.1*sft"}).loss.name == "sigmoid+0.1*sft"


def test_limits_of_0_are_the_models():
    config = configured(**{"data.max_prompt_tokens": 0, "data.max_response_tokens": 0})

    def limits(positions):
        return with_limits(config, positions).data

    assert (limits(512).max_prompt_tokens, limits(512).max_response_tokens) == (256, 256)
    assert (limits(8192).max_prompt_tokens, limits(8192).max_response_tokens) == (512, 512)
    assert with_limits(configured(), 8192).data == configured().data


def test_the_general_config_is_one_epoch_of_preferences_or_sft_alone():
    own = {"data.train": "a.jsonl", "model.init": "model"}
    config = configured("configs/dpo.py", **own)
    assert (
        with_steps(config, 100.0).num_steps == 100
        and with_steps(config, 100.0).optim.warmup_steps == 10
    )
    assert (
        config.sft.num_steps == 0 and config.data.prompt_template == "" and config.data.text_as_chat
    )
    # a default gives way
    assert configured("configs/dpo.py", **own, **{"data.eval": "b.jsonl"}).data.eval_share == 0
    sft = configured("configs/dpo.py:sft", **own)
    assert (sft.num_steps, sft.sft.num_steps) == (0, 500)
    for name in ("zephyr", "tulu3"):
        recipe = configured(f"configs/recipes.py:{name}", **own).data
        assert (recipe.prompt_template, recipe.text_as_chat) == ("", True)


# --- sources --------------------------------------------------------------------------------------


def write(path, prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"prompt": p, "chosen": "a", "rejected": "b"}) + "\n" for p in prompts)
    )
    return str(path)


def test_several_files_globs_and_folders_are_one_list_of_rows(tmp_path):
    one, two = write(tmp_path / "d/a.jsonl", "xy"), write(tmp_path / "d/b.jsonl", "z")
    (tmp_path / "d/notes.txt").write_text("no data")
    comma = write(tmp_path / "with,comma=1.jsonl", "q")
    for spec in (f"{one},{two}", f"{one}, {two}", str(tmp_path / "d"), str(tmp_path / "d/*.jsonl")):
        records = pickle.loads(pickle.dumps(open_sources(spec)))  # as a worker process gets it
        assert [records.get(i)["prompt"] for i in range(records.size)] == ["x", "y", "z"]
        assert [records.where(i) for i in range(records.size)] == [
            "a.jsonl:1",
            "a.jsonl:2",
            "b.jsonl:1",
        ]
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
        {
            "prompt": str(i // 2),
            "responses": ["a", "b", "c", "d"][: 2 + i % 3],
            "scores": list(range(2 + i % 3)),
        }
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
        assert taken.responses(new) == index.responses(int(old)) and taken.pairs(
            new
        ) == index.pairs(int(old))
    drawn = index.drawn_prompts(0.25, 0)
    assert 1 <= len(drawn) < len(np.unique(index.prompt_hashes))
    shuffled = index.select(np.arange(len(index.rows))[::-1])
    np.testing.assert_array_equal(np.sort(shuffled.drawn_prompts(0.25, 0)), np.sort(drawn))


# --- a refused run --------------------------------------------------------------------------------


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
def test_a_refused_run_leaves_every_byte_of_the_workdir_as_it_was(
    finished, plain, files, name, capsys
):
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
    """The same where the first run had an SFT stage, and its workdir holds no checkpoint of the
    preference stage.
    """
    from dpojax.main import main

    settings = {"sft.num_steps": 2, "num_steps": 2, "mesh.data": 1, "mesh.fsdp": 1}
    run(files, tmp_path / "w", **settings)
    shutil.rmtree(tmp_path / "w/checkpoints")
    before = content(tmp_path / "w")
    for changes in (
        {"sft.learning_rate": 1e-2},
        {"sft.num_steps": 1},
        {"seed": 1},
        {"data.max_response_tokens": 9},
    ):
        argv = command(files, tmp_path / "w", **{**settings, "mesh.data": -1, **changes})[3:]
        assert main(argv) == 4, changes
        after = content(tmp_path / "w")
        assert {k for k in before | after if before.get(k) != after.get(k)} == set(), changes


# --- runs of other kinds --------------------------------------------------------------------------


@pytest.mark.slow
def test_epochs_a_held_out_share_and_no_held_out_pairs_at_all(files, tmp_path):
    settings = {"num_steps": None, "num_epochs": 0.5, "data.eval": None, "data.eval_share": 0.25}
    output = run(files, tmp_path / "share", **settings)
    assert "held out: " in output and "0.5 epochs" in output
    steps = json.loads((tmp_path / "share/summary.json").read_text())["num_steps"]
    assert steps == 3 == max(r["step"] for r in rows(tmp_path / "share"))
    run(files, tmp_path / "none", **{"data.eval": None, "num_steps": 2})
    assert (
        all("eval_loss" not in r for r in rows(tmp_path / "none"))
        and (tmp_path / "none/report.html").is_file()
    )


@pytest.mark.slow
def test_named_held_out_sets_are_logged_apart_and_together(files, plain, tmp_path):
    half = tmp_path / "half.jsonl"
    half.write_text("".join((files / "eval.jsonl").read_text().splitlines(keepends=True)[:5]))
    run(files, tmp_path / "w", **{"data.eval": f"all={files / 'eval.jsonl'},half={half}"})
    summary, before = (
        json.loads((w / "summary.json").read_text()) for w in (tmp_path / "w", plain[0])
    )
    assert summary["eval_all_loss"] == pytest.approx(before["eval_loss"], abs=1e-5)
    assert summary["eval_half_rewards/margins"] != summary["eval_all_rewards/margins"]
    assert summary["eval_loss"] == pytest.approx(
        (16 * summary["eval_all_loss"] + 5 * summary["eval_half_loss"]) / 21
    )


@pytest.mark.slow
def test_sft_alone_and_evaluation_alone(files, plain, tmp_path):
    completions = tmp_path / "sft.jsonl"
    lines = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    completions.write_text(
        "".join(
            json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in lines
        )
    )
    sft = {
        "num_steps": 0,
        "sft.num_steps": 3,
        "data.train": completions,
        "data.eval": None,
        "export": True,
    }
    run(files, tmp_path / "sft", **sft)
    assert json.loads((tmp_path / "sft/summary.json").read_text())["sft_loss"] > 0
    assert (tmp_path / "sft/export/config.json").is_file()
    evaluation = {"num_steps": 0, "model.init": plain[0], "data.train": None, "tokenizer": ""}
    sizes = dict.fromkeys(("model.hidden_size", "model.intermediate_size", "model.head_dim"))
    run(files, tmp_path / "eval", **evaluation, **sizes, **{"reference.init": tmp_path / "sft"})
    summary, before = (
        json.loads((w / "summary.json").read_text()) for w in (tmp_path / "eval", plain[0])
    )
    assert summary["eval_logps/chosen"] == pytest.approx(before["eval_logps/chosen"], abs=1e-3)
    assert summary["num_steps"] == 0 and len(losses(tmp_path / "eval")) == 0


# --- what made the training text ------------------------------------------------------------------

OTHER_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt"
    " %}<assistant> {% endif %}"
)
WRITINGS = {
    "prompt template": {
        "prompt_template": "Post: {prompt}\nAnswer:",
        "max_prompt_tokens": 40,
        "max_response_tokens": 7,
    },
    "chat": {"text_as_chat": True, "max_prompt_tokens": 0, "max_response_tokens": 5},
}


def tool_prompts(folder: pathlib.Path, data: str, *flags: str):
    """Prompt ids, and response lengths, as generate, score and audit
    read them from a run's folder.
    """
    from dpojax import audit, generate, score
    from dpojax.data.sources import open_sources
    from dpojax.generation import loaded

    parsed = generate.parser().parse_args([f"--model={folder}", f"--prompts={data}", *flags])
    prompts = generate.read_prompts(parsed, loaded.open_text(parsed.model, parsed, Writing()))
    scored = score.parser().parse_args([f"--model={folder}", f"--data={data}", *flags])
    text = loaded.open_text(scored.model, scored, score.DEFAULTS)
    groups = [text.dataset(open_sources(data), "score").token_group(i)[0] for i in range(2)]
    audited = loaded.open_text(
        "",
        generate.parser().parse_args(["--model=x", f"--tokenizer={folder}", *flags]),
        audit.DEFAULTS,
    )
    pairs = [audited.dataset(open_sources(data), "pairs").token_group(i)[0] for i in range(2)]

    def ids(found):
        return [g.prompt.tolist() for g in found]

    def lengths(found):
        return [[len(r) for r in g.responses] for g in found]

    assert [p.ids for p in prompts[:2]] == ids(groups) == ids(pairs) and lengths(groups) == lengths(
        pairs
    )
    return ids(groups), lengths(groups)


@pytest.mark.parametrize("name", WRITINGS)
def test_generate_score_and_audit_write_prompts_as_the_run_did(files, tmp_path, name):
    """The files that a run leaves beside its tokenizer are all that they are told."""
    folder = tmp_path / "run/tokenizer"
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(str(files / "tokenizer.model"))
    tokenizer.save(folder)
    if name == "chat":
        (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    writing = Writing(**WRITINGS[name])
    writing.save(folder)
    long_prompt = "I feel sad now. " * 9 + "It cost 40 dollars"
    made = [{"prompt": long_prompt, "chosen": " I feel sad." * 5, "rejected": " No." * 9}] * 2
    data = str(tmp_path / "pairs.jsonl")
    pathlib.Path(data).write_text("".join(json.dumps(r) + "\n" for r in made))
    prompts, lengths = tool_prompts(tmp_path / "run", data)
    row = open_sources(data).get(0)
    written = (
        f"<user> {row['prompt']}\n<assistant> "
        if name == "chat"
        else f"Post: {row['prompt']}\nAnswer:"
    )
    ids = tokenizer.encode_prompt(written)
    # the world's tokenizer puts a BOS, a chat template brings its own
    size = len(ids) + (name != "chat")
    assert prompts[0][-9:] == ids[-9:] and len(prompts[0]) == min(
        size, writing.max_prompt_tokens or size
    )
    assert max(map(max, lengths)) == writing.max_response_tokens
    plain, long = tool_prompts(
        tmp_path / "run", data, "--prompt_template={prompt}", "--max_response_tokens=0"
    )
    # the command line goes before it
    assert plain[0] != prompts[0] and max(map(max, long)) > writing.max_response_tokens
    (folder / "dpojax.json").write_text('{"max_prompt_tokens": "many"}')
    with pytest.raises(ConfigError, match=r"dpojax\.json: max_prompt_tokens"):
        tool_prompts(tmp_path / "run", data)


@pytest.mark.slow
def test_a_runs_template_and_what_ends_a_response_go_into_workdir_and_export(shared_data, tmp_path):
    from dpojax.untrusted.plain_data import read_json

    model = shared_data / "models/TinyStories-656K"
    (tmp_path / "other.jinja").write_text(OTHER_TEMPLATE + "{# other #}")
    rows = [
        {"prompt": f"Tell me of {i} dogs.", "chosen": f"{i} dogs ran.", "rejected": "No."}
        for i in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"data.train": tmp_path / "d.jsonl", "data.eval": tmp_path / "d.jsonl", "tokenizer": ""}
    sizes = dict.fromkeys(("model.hidden_size", "model.intermediate_size", "model.head_dim"))
    chat = {
        "data.chat_template": tmp_path / "other.jinja",
        "data.text_as_chat": True,
        "data.max_response_tokens": 9,
    }
    short = {
        "num_steps": 2,
        "batch_size": 2,
        "export": True,
        "model.init": model,
        "sample.num_prompts": 2,
    }
    output = run(None, tmp_path / "w", **data, **sizes, **chat, **short)
    assert "warning: optim.learning_rate=0.001" in output
    for place in (tmp_path / "w/tokenizer", tmp_path / "w/export"):
        assert (place / "chat_template.jinja").read_text() == OTHER_TEMPLATE + "{# other #}"
        writing = read_json(place / "dpojax.json")
        assert writing["text_as_chat"] and writing["max_response_tokens"] == 9
        assert read_json(place / "generation_config.json")["eos_token_id"] == 2
    prompts, lengths = tool_prompts(tmp_path / "w", str(tmp_path / "d.jsonl"))
    assert (
        load_tokenizer(str(model))
        .decode(prompts[0])
        .startswith("<user> Tell me of 0 dogs.\n<assistant>")
    )
    assert tool_prompts(tmp_path / "w/export", str(tmp_path / "d.jsonl")) == (prompts, lengths)


# --- the audit ------------------------------------------------------------------------------------


def audited(capsys, code, *flags):
    from dpojax import audit

    assert audit.main(["--color=never", *flags]) == code
    done = capsys.readouterr()
    return done.out + done.err


def test_the_audit_counts_before_and_after_truncation_and_knows_kinds_of_rows(
    files, tmp_path, capsys
):
    tokenizer = f"--tokenizer={files / 'tokenizer.model'}"
    words = " It cost 40 dollars. I feel sad now."
    made = [
        # chosen is longer, and then as long
        {"prompt": "I feel sad.", "chosen": words * 9, "rejected": " So" + words},
        # the same after the cut
        {"prompt": "I feel ashamed.", "chosen": words * 2, "rejected": words * 3},
        {"prompt": "I feel ill.", "chosen": words, "rejected": words},  # the same before it
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in made))
    text = audited(capsys, 0, f"--data={data}", tokenizer, "--max_response_tokens=8")
    assert "1 dropped, chosen and rejected are the same: pairs.jsonl:3" in text
    assert "1 dropped after truncation, chosen and rejected are the same: pairs.jsonl:2" in text
    assert "length before truncation: chosen is the longer one in 50.0%" in text  # 1 of 2
    assert "length after truncation: chosen is the longer one in 50.0%" in text
    kto = tmp_path / "kto.jsonl"
    kto.write_text(json.dumps({"prompt": "I feel sad.", "completion": words, "label": True}) + "\n")
    assert "1 usable labelled responses" in audited(capsys, 0, f"--data={kto}", tokenizer)
    sft = tmp_path / "sft.jsonl"
    sft.write_text(json.dumps({"prompt": "I feel sad.", "completion": words}) + "\n")
    assert "can serve as sft.data" in audited(capsys, 0, f"--data={sft}", tokenizer)
    data.write_text(json.dumps({"prompt": "x"}) + "\n")
    assert "none of its 1 rows is usable; pairs.jsonl:1: column 'chosen'" in audited(
        capsys, 3, f"--data={data}", tokenizer
    )
    template = tmp_path / "t.jinja"
    template.write_text(OTHER_TEMPLATE)
    sides = {
        s: [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": s}]
        for s in ("chosen", "rejected")
    }
    data.write_text(json.dumps(sides) + "\n")
    assert "no chat template" in audited(capsys, 2, f"--data={data}", tokenizer)
    assert "1 usable pairs" in audited(
        capsys, 0, f"--data={data}", tokenizer, f"--chat_template={template}"
    )


# --- what is said at the start --------------------------------------------------------------------


def test_an_own_reward_function_is_tried_on_two_samples(tmp_path):
    from dpojax.generation.rewards import check_scores, try_reward

    bodies = {
        "[1.0] * len(r)": None,
        "1.0": "gave 1.0",
        "[1.0]": "gave 1 scores for 2 responses",
        "[float('nan')] * 2": "nan",
        "['good'] * 2": "number for every response",
        "p[9]": "fails on 2 samples: IndexError",
    }
    for number, (body, says) in enumerate(bodies.items()):
        path = tmp_path / f"reward{number}.py"
        path.write_text(f"def judge(p, r):\n    return {body}\n")
        if says is None:
            try_reward(f"{path}:judge", ["a", "b"], ["c", "d"])
            continue
        with pytest.raises(ConfigError, match=says):
            try_reward(f"{path}:judge", ["a", "b"], ["c", "d"])
    assert check_scores("x:y", np.ones(2), 2) == [1.0, 1.0]


def test_a_model_or_data_set_that_is_not_here_says_how_to_fetch_it(
    tmp_path, monkeypatch, capsys, files
):
    import importlib

    from dpojax import generate, score
    from dpojax.main import main
    from dpojax.weights.open import open_weights

    with pytest.raises(ConfigError, match=r"model\.init='org/Model-1': .* hf download org/Model-1"):
        open_weights("org/Model-1")
    with pytest.raises(ConfigError, match=r"no such file or folder$"):
        open_weights("./nowhere")
    # Whatever else is wrong, the model is said first.
    argv = [
        "--config=configs/dpo.py",
        f"--workdir={tmp_path}/w",
        "--config.model.init=org/name",
        "--config.data.train=nowhere",
    ]
    monkeypatch.chdir(ROOT)
    assert main(argv) == 2 and "hf download org/name" in capsys.readouterr().err
    for tool in (generate, score):
        data = "--prompts=nowhere" if tool is generate else "--data=nowhere"
        assert (
            tool.main(["--model=org/name", data]) == 2
            and "--model='org/name'" in capsys.readouterr().err
        )

    class Offline:
        def load_dataset(self, *args, **options):
            raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(importlib, "import_module", lambda name: Offline())
    with pytest.raises(
        ConfigError, match=r"^hf:a/b:test cannot be opened \(ConnectionError: no route\).*$"
    ):
        open_sources("hf:a/b:test")


def test_settings_that_do_not_suit_pretrained_weights_are_said(files):
    from dpojax.algorithms.fitness import unfit_settings
    from dpojax.weights.open import Weights

    tokenizer = load_tokenizer(str(files / "tokenizer.model"))
    made = [{"prompt": f"Say {i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    data = Dataset(in_memory("rows", made), RowReader(""), tokenizer, Limits(64, 64))
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    weights = Weights(None, None, None, None)  # pyright: ignore[reportArgumentType]

    def said(epochs: Any = 1.0, file: Any = "configs/dpo.py", **changes: Any):
        config = configured(file, **{"data.train": "rows.jsonl", "model.init": "model", **changes})
        lines = unfit_settings(config, data, index, weights, epochs)
        return " ".join(line for line in lines if not line.startswith("note: "))

    assert said() == ""
    assert "optim.learning_rate=0.0001" in said(file="configs/tldr.py")
    assert "adapters take" in said(**{"lora.rank": 4})
    assert "9.0 epochs" in said(9.0, file="configs/tldr.py")
    assert "TL;DR" in said(**{"data.prompt_template": "{prompt} TL;DR:"})
    assert unfit_settings(configured(), data, index, None, 99.0) == []
