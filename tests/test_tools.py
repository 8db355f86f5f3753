"""The command lines of generate, score and convert, as their users call them."""

import gzip
import importlib.util
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
import tiny
from runs import ROOT, environment

from dpojax import convert, generate, score
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.generation.decoding import SampleSettings, make_sampler
from dpojax.main import main
from dpojax.runtime import sharding
from dpojax.runtime.mesh import make_mesh
from dpojax.weights import export, huggingface, safetensors

PROMPTS = ["Once upon a time", "Lily and Tom went to", "The little dog"]


@pytest.fixture
def stories(shared_data):
    return str(shared_data / "models/TinyStories-656K")


@pytest.fixture
def loaded(stories):
    config = huggingface.read_config(huggingface.pathlib.Path(stories))
    model = tiny.model(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    params = huggingface.load_params(
        huggingface.pathlib.Path(stories),
        config,
        sharding.param_shardings(abstract, model.axes, mesh, {}),
        jnp.float32,
    )
    return model, params, load_tokenizer(stories)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, made):
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(path)


# --- generate -------------------------------------------------------------------------------------


def run_generate(tmp_path, stories, *flags, prompts=None, code=0) -> Any:
    file = write(
        tmp_path / "prompts.jsonl",
        prompts or [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)],
    )
    out = tmp_path / "out.jsonl"
    assert (
        generate.main([f"--model={stories}", f"--prompts={file}", f"--out={out}", *flags]) == code
    )
    return rows(out) if code == 0 else None


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="torch and transformers are not installed",
)
def test_greedy_text_is_that_of_transformers(tmp_path, stories):
    import torch
    import transformers

    found = run_generate(
        tmp_path, stories, "--temperature=0", "--max_new_tokens=100", "--token_logps"
    )
    tokenizer = load_tokenizer(stories)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        stories, dtype=torch.float32
    ).eval()
    for row in found:
        ids = [tokenizer.bos_id, *tokenizer.encode_prompt(row["prompt"])]
        own = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=100,
            do_sample=False,
        )
        (response,) = row["responses"]
        assert len(response["ids"]) == 100 or response["finish"] == "stop"
        assert response["ids"] == own[0, len(ids) :].tolist()
        assert response["text"] == tokenizer.decode(response["ids"])


@pytest.mark.slow
def test_samples_come_with_their_log_probs_and_their_rows(tmp_path, stories, loaded, capfd):
    flags = (
        "--num_samples=2",
        "--max_new_tokens=16",
        "--token_logps",
        "--top_p=0.9",
        "--temperature=0.8",
        "--batch_size=2",
    )
    found = run_generate(tmp_path, stories, *flags)
    assert [(r["id"], r["prompt"]) for r in found] == list(enumerate(PROMPTS))
    model, params, tokenizer = loaded
    for row in found:
        first, second = row["responses"]
        assert first["ids"] != second["ids"]
        ids = [tokenizer.bos_id, *tokenizer.encode_prompt(row["prompt"])]
        # a forward of its own, whatever the filters
        own = tiny.naive_logps(model, params, ids, first["ids"])
        np.testing.assert_allclose(first["token_logps"], own, atol=1e-4)
        assert first["logp"] == pytest.approx(sum(first["token_logps"]), abs=1e-4) and first[
            "num_tokens"
        ] == len(first["ids"])
    assert "nats per token" in capfd.readouterr().out
    assert run_generate(tmp_path, stories, *flags) == found  # by seed
    assert run_generate(tmp_path, stories, *flags, "--seed=1") != found
    alone = run_generate(tmp_path, stories, *flags, prompts=[{"prompt": PROMPTS[0], "id": 0}])
    # whatever else is in the batch
    assert alone[0]["responses"][0]["ids"] == found[0]["responses"][0]["ids"]


def test_stop_strings_end_responses_early_and_are_cut_off(tmp_path, stories):
    greedy = ("--temperature=0", "--token_logps", "--max_new_tokens=96")
    whole = run_generate(tmp_path, stories, *greedy)
    cut = run_generate(tmp_path, stories, *greedy, "--stop=.", "--stop=!")
    lines = run_generate(tmp_path, stories, *greedy, "--stop=\\n")  # as shells pass it on
    assert [r["responses"][0]["text"] for r in lines] == [
        r["responses"][0]["text"].split("\n")[0] for r in whole
    ]
    tokenizer = load_tokenizer(stories)
    for a, b in zip(whole, cut, strict=True):
        long, short = a["responses"][0], b["responses"][0]
        end = min(p for p in (long["text"].find("."), long["text"].find("!")) if p >= 0)
        assert short["text"] == long["text"][:end] and short["finish"] == "stop"
        ids = short["ids"]
        # no token too many
        assert long["ids"][: len(ids)] == ids and not {".", "!"} & set(tokenizer.decode(ids[:-1]))
        assert short["logp"] == pytest.approx(sum(long["token_logps"][: len(ids)]), abs=1e-4)


def test_drawing_stops_when_all_responses_have_ended():
    model = tiny.model()
    # half of all tokens end a response
    settings = SampleSettings(64, 1.0, 0, 1.0, tuple(range(30)), 0)
    sampler = make_sampler(model, settings)
    start = sampler.start(
        tiny.params(model),
        jnp.full((4, 8), 7),
        jnp.ones((4, 8), bool),
        jax.random.key_data(jax.random.split(jax.random.key(0), 4)),
    )
    done = jax.jit(sampler.extend)(tiny.params(model), start, 64)
    assert int(done.step) == int(done.lengths.max()) < 64 and bool(done.done.all())


def test_prompts_of_every_kind(tmp_path, stories, capfd):
    tokenizer = load_tokenizer(stories)
    ids = [tokenizer.bos_id, *tokenizer.encode_prompt(PROMPTS[0])]
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    flags = ("--temperature=0", "--max_new_tokens=8", f"--chat_template={template}")
    made = [
        {"prompt_ids": ids},
        {"prompt": PROMPTS[0]},
        {"messages": [{"role": "user", "content": "<s>".join([PROMPTS[0]])}]},
    ]
    texts = [
        r["responses"][0]["text"] for r in run_generate(tmp_path, stories, *flags, prompts=made[:2])
    ]
    assert texts[0] == texts[1]
    assert len(run_generate(tmp_path, stories, *flags, prompts=made[2:])[0]["responses"]) == 1
    run_generate(tmp_path, stories, prompts=[{"text": "x"}], code=3)
    assert "prompts.jsonl:1: column 'prompt'" in capfd.readouterr().err
    run_generate(tmp_path, stories, "--top_p=0", code=2)
    run_generate(tmp_path, stories, "--chat", code=3)  # the tokenizer has no template
    assert generate.main([f"--model={stories}", "--prompt=Once", "--max_new_tokens=4"]) == 0
    assert len(json.loads(capfd.readouterr().out.splitlines()[0])["responses"]) == 1


def test_generation_over_a_mesh_is_the_same(tmp_path, stories):
    def run(*flags):
        return [
            r["responses"]
            for r in run_generate(
                tmp_path, stories, "--max_new_tokens=12", "--temperature=0", *flags
            )
        ]

    plain = run()

    def texts(found):
        return [r[0]["text"] for r in found]

    assert texts(run("--tensor=4")) == texts(plain)


# --- score ----------------------------------------------------------------------------------------


def test_scores_are_the_log_probs_of_a_plain_forward_and_rewards_follow(
    tmp_path, shared_data, stories, loaded, capfd
):
    with gzip.open(shared_data / "tldr/validation.jsonl.gz", "rt") as file:
        pairs = [json.loads(next(file)) for _ in range(6)]
    bad = {**pairs[0], "rejected": pairs[0]["chosen"]}
    data = write(
        tmp_path / "pairs.jsonl", [*pairs[:3], {**pairs[0], "chosen": " "}, *pairs[3:], bad]
    )
    moved = tmp_path / "moved"
    model, params, tokenizer = loaded
    config = huggingface.read_config(huggingface.pathlib.Path(stories))
    other = jax.tree.map(lambda x: x * 1.05, params)
    export.export_params(
        other,
        config,
        moved,
        fields=huggingface.read_fields(huggingface.pathlib.Path(stories)),
        dtype="float32",
        companions=huggingface.pathlib.Path(stories),
    )
    out = tmp_path / "scores.jsonl"
    argv = [
        f"--model={moved}",
        f"--ref={stories}",
        f"--data={data}",
        f"--out={out}",
        "--beta=0.5",
        "--batch_size=3",
        "--max_prompt_tokens=300",
    ]
    assert score.main(argv) == 0
    found = rows(out)
    assert [r["row"] for r in found] == list(range(8)) and "empty" in found[3]["left_out"]
    row, pair = found[0], pairs[0]
    ids = [tokenizer.bos_id, *tokenizer.encode_prompt(pair["prompt"])[-299:]]
    for side in ("chosen", "rejected"):
        answer = [*tokenizer.encode_continuation(pair[side]), tokenizer.eos_id][:2048]
        own, ref = (tiny.naive_logps(model, p, ids, answer).sum() for p in (other, params))
        assert row[f"{side}_length"] == len(answer)
        assert row[f"{side}_logps"] == pytest.approx(own, abs=2e-3) and row[
            f"ref_{side}_logps"
        ] == pytest.approx(ref, abs=2e-3)
        assert row[f"{side}_reward"] == pytest.approx(
            0.5 * (row[f"{side}_logps"] - row[f"ref_{side}_logps"])
        )
    assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"])
    assert found[-1]["margin"] == 0  # equal responses are a tie
    summary = json.loads((tmp_path / "scores.jsonl.summary.json").read_text())
    margins = [r["margin"] for r in found if "margin" in r]
    assert summary["accuracy"] == pytest.approx(
        np.mean([(m > 0) + 0.5 * (m == 0) for m in margins])
    )
    assert summary["accuracy_low"] <= summary["accuracy"] <= summary["accuracy_high"] and summary[
        "left_out"
    ] == {"empty_response": 1}
    assert "accuracy" in capfd.readouterr().out


def test_two_models_are_compared_only_where_ids_mean_the_same_to_both(tmp_path, files, capsys):
    base = model_folders.make_model(tmp_path / "base", files)
    pairs = model_folders.write_pairs(tmp_path / "pairs.jsonl")
    tokenizer = load_tokenizer(str(base))
    texts = [" ".join(row) for row in model_folders.ROWS]
    used = {
        i
        for text in texts
        for i in (*tokenizer.encode_prompt(text), *tokenizer.encode_continuation(text))
    }
    plain = [i for i in range(tokenizer.vocab_size) if tokenizer.piece(i).isalpha()]
    common, rare = [i for i in plain if i in used], [i for i in plain if i not in used]
    others = {
        "same": lambda folder: None,
        "rare": lambda folder: model_folders.renumber(folder, [rare[:2]]),
        "json": model_folders.as_json,
        "renumbered": lambda folder: model_folders.renumber(folder, [(common[0], rare[0])]),
    }
    for name, change in others.items():
        other = model_folders.make_model(tmp_path / name, files)
        change(other)
        flags = [
            f"--model={base}",
            f"--ref={other}",
            f"--data={pairs}",
            f"--out={tmp_path / 'out.jsonl'}",
        ]
        code = 2 if name == "renumbered" else 0
        assert score.main(flags) == code, (name, capsys.readouterr().err)
        if code:
            assert "do not share a tokenizer" in capsys.readouterr().err
            training = model_folders.training(
                files, tmp_path / "run", pairs, **{"model.init": base, "reference.init": other}
            )
            for mode in ("live", "cached"):
                assert main([*training, f"--config.reference.mode={mode}"]) == 2
                assert "reference.init" in (said := capsys.readouterr().err) and "tokenizer" in said
        else:
            assert all(r["chosen_reward"] == 0 for r in rows(tmp_path / "out.jsonl"))


@pytest.mark.slow
def test_pieces_past_the_embedding_that_no_row_holds_do_not_count(tmp_path, files, capsys):
    vocab_size = load_tokenizer(str(files)).vocab_size
    pairs = model_folders.write_pairs(tmp_path / "pairs.jsonl")
    short = model_folders.make_model(tmp_path / "short", files, vocab_size=vocab_size - 1)
    flags = [f"--model={short}", f"--data={pairs}", f"--out={tmp_path / 'out.jsonl'}"]
    assert (
        score.main(flags) == 0
        and main(model_folders.training(files, tmp_path / "run", pairs, **{"model.init": short}))
        == 0
    )
    assert (
        generate.main(
            [f"--model={short}", "--prompt=Hi", f"--out={tmp_path / 'out'}", "--max_new_tokens=4"]
        )
        == 0
    )
    capsys.readouterr()
    tiny_one = model_folders.make_model(tmp_path / "tiny", files, vocab_size=100)
    flags[0] = f"--model={tiny_one}"
    for function, argv in (
        (score.main, flags),
        (main, model_folders.training(files, tmp_path / "no", pairs, **{"model.init": tiny_one})),
    ):
        assert function(argv) == 2
        assert "holds the token id" in capsys.readouterr().err


def test_candidates_are_ranked_in_their_own_order(tmp_path, stories, loaded):
    model, params, tokenizer = loaded
    texts = [" xx qq zz", ", there was a little girl", " xx qq zz", ", there was a dog"]
    data = write(
        tmp_path / "c.jsonl",
        [
            {"prompt": PROMPTS[0], "completions": texts},
            {"prompt": PROMPTS[1], "responses": texts[:2], "scores": [1, 1]},
        ],
    )
    out = tmp_path / "o.jsonl"
    assert score.main([f"--model={stories}", f"--data={data}", f"--out={out}"]) == 0
    first, second = rows(out)
    ids = [tokenizer.bos_id, *tokenizer.encode_prompt(PROMPTS[0])]
    own = [
        tiny.naive_logps(
            model, params, ids, [*tokenizer.encode_continuation(t), tokenizer.eos_id]
        ).sum()
        for t in texts
    ]
    np.testing.assert_allclose(first["logps"], own, atol=1e-3)
    assert first["best"] == int(np.argmax(own)) and len(second["logps"]) == 2


def test_masked_tokens_do_not_count_in_scores(tmp_path, stories, loaded):
    model, params, _ = loaded
    made = {
        "prompt_ids": [1, 5, 9],
        "chosen_ids": [7, 8, 2],
        "rejected_ids": [4, 2],
        "chosen_mask": [1, 0, 1],
    }
    data = write(
        tmp_path / "m.jsonl",
        [
            made,
            {**made, "rejected_mask": [0, 0]},
            {"prompt": "a", "completions": ["b"], "chosen": None},
        ],
    )
    out = tmp_path / "o.jsonl"
    assert score.main([f"--model={stories}", f"--data={data}", f"--out={out}"]) == 0
    first, second, third = rows(out)
    own = tiny.naive_logps(model, params, [1, 5, 9], [7, 8, 2])
    assert (
        first["chosen_logps"] == pytest.approx(own[0] + own[2], abs=1e-4)
        and first["chosen_length"] == 2
    )
    assert "empty" in second["left_out"] and third["best"] == 0


def test_bad_calls_of_score_say_what_is_wrong(tmp_path, stories, capfd):
    data = write(tmp_path / "d.jsonl", [{"prompt": "a", "chosen": "b"}])
    assert score.main([f"--model={stories}", f"--data={data}"]) == 3
    assert "d.jsonl:1: column 'rejected' is missing" in capfd.readouterr().err
    assert score.main([f"--model={tmp_path}/none", f"--data={data}", "--tokenizer=" + stories]) == 2
    assert "--model" in capfd.readouterr().err
    assert score.main([f"--model={stories}", f"--data={data}", "--beta=0"]) == 2


# --- convert --------------------------------------------------------------------------------------


def test_convert_keeps_weights_and_what_lies_beside_them(tmp_path, stories):
    out = tmp_path / "out"
    assert convert.main([f"--model={stories}", f"--out={out}", "--max_shard_gib=0.001"]) == 0
    source = huggingface.pathlib.Path(stories)
    a, b = safetensors.Directory(source), safetensors.Directory(out)

    # the tied table may change its name
    def name(n, d):
        return n if n in d.names() else "lm_head.weight"

    for key in b.names():
        np.testing.assert_array_equal(b.tensors[key], a.tensors[name(key, a)])
    for file in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert huggingface.read_config(out) == huggingface.read_config(source)
    assert convert.main([f"--model={stories}", f"--out={stories}"]) == 2
    half = tmp_path / "half"
    assert convert.main([f"--model={out}", f"--out={half}", "--dtype=bfloat16"]) == 0
    assert (
        huggingface.read_fields(half)["torch_dtype"] == "bfloat16"
        and (half / "model.safetensors").stat().st_size < 1.4e6
    )


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["generate", "score", "convert"])
def test_help_answers(tool):
    argv = [sys.executable, "-m", f"dpojax.{tool}", "--help"]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--model" in done.stdout
