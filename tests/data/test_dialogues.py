"""Dialogues: what the template sees, where the text is split into tokens, and how a prompt that is
too long is cut.
"""

import itertools
import json
import pickle

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from dpojax import audit
from dpojax.data.chat import ChatTemplate
from dpojax.data.groups import Dropped
from dpojax.data.open_tokenizer import chat_template, load_tokenizer
from dpojax.data.prompts import PromptReader
from dpojax.data.rows import RowReader
from dpojax.data.tokens import Limits, tokenize
from dpojax.data.written import Writing
from dpojax.errors import ConfigError, DataError

# It writes every field that a message may hold, and what it sees beside the messages.
SEEING = (
    "{{ '[' ~ tools|tojson ~ ']' if tools }}{{ documents|tojson if documents }}{{ mood if mood is"
    " defined }}{% for m in messages %}<|{{ m.role }}|>{% for key, value in m|dictsort if key !="
    " 'role' and key != 'content' %}({{ key }}={{ value|tojson }}){% endfor %}{{ m.content or ''"
    " }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASK, ANSWER = {"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "4."}
TOOL = {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "4 degrees"}


def read(row, kind="pairs", source=SEEING):
    return RowReader("", kind, ChatTemplate(source)).read(row, "rows:1")


def pair(prompt, chosen=ANSWER, rejected=None, **more):
    return {
        "prompt": prompt,
        "chosen": [chosen],
        "rejected": [rejected or {**ANSWER, "content": "Warm."}],
        **more,
    }


# --- fields ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, '"city": "Oslo"'),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, '"city": "Oslo"'),
        ({"role": "assistant", "tool_calls": [CALL]}, '"city": "Oslo"'),
        (TOOL, '(name="weather")(tool_call_id="c1")4 degrees'),
        ({**ANSWER, "reasoning_content": "Hm."}, '(reasoning_content="Hm.")(thinking="Hm.")4.'),
        ({**ANSWER, "thinking": "Hm."}, '(reasoning_content="Hm.")(thinking="Hm.")4.'),
        ({**ANSWER, "weight_of": {"a": [1, {"b": 2}]}}, '(weight_of={"a": [1, {"b": 2}]})'),
        ({**ANSWER, "extra": None}, "<|assistant|>4."),
        ({**TOOL, "extra": {"a": None, "b": [None, {"c": None}]}}, '(extra={"b": [null, {}]})'),
    ],
)
def test_every_field_reaches_the_template_in_every_command(message, shown, tmp_path):
    prompt = [ASK, message, ASK]
    row = pair(prompt)
    texts = [read(row, kind).prompt for kind in ("pairs", "sft", "unpaired", "score")]
    texts.append(read({"prompt": prompt, "completion": [ANSWER], "label": True}, "unpaired").prompt)
    assert shown in texts[0] and len(set(texts)) == 1
    save_tokenizer(tmp_path, "first")
    tokenizer = load_tokenizer(str(tmp_path))
    reader = PromptReader(tokenizer, ChatTemplate(SEEING), Writing())
    (found,) = reader.read_all([({"messages": prompt}, "rows:1")])
    assert found.ids == tokenizer.encode_chat(str(texts[0]))[0]


def test_tools_documents_and_variables_reach_the_template():
    row = pair(
        [ASK],
        tools=[{"name": "a", "of": None}],
        documents=[{"title": "b"}],
        chat_template_kwargs={"mood": "sad"},
    )
    assert str(read(row).prompt).startswith('[[{"name": "a"}]][{"title": "b"}]sad<|user|>')
    as_text = {key: json.dumps(row[key]) for key in ("tools", "documents", "chat_template_kwargs")}
    assert read({**row, **as_text}) == read(row)
    for key, value in (("tools", [3]), ("documents", "[{"), ("chat_template_kwargs", [1])):
        with pytest.raises(DataError, match=f"rows:1: column '{key}'"):
            read({**row, key: value})


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "reasoning_content", "thinking"])
def test_a_prompt_template_names_the_field_that_it_cannot_write(field):
    with pytest.raises(DataError, match=f"rows:1: a message holds '{field}'"):
        RowReader("{prompt}").read(pair([ASK], chosen={**ANSWER, field: "x"}), "rows:1")
    with pytest.raises(DataError, match="rows:1: the row holds 'tools'"):
        RowReader("{prompt}").read(pair([ASK], tools=[{"name": "a"}]), "rows:1")


def test_pairs_are_judged_by_what_the_template_writes():
    calls = [{"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": i}]} for i in "ab"]
    assert len(read(pair([ASK], *calls)).pairs) == 1
    thoughts = [{**ANSWER, "reasoning_content": text} for text in ("I know.", "I guess.")]
    assert len(read(pair([ASK], *thoughts)).pairs) == 1
    plain = SEEING.replace("({{ key }}={{ value|tojson }})", "")  # of these fields it writes none
    for answers, reason in ((calls, "empty_response"), (thoughts, "identical")):
        with pytest.raises(Dropped, match=reason):
            read(pair([ASK], *answers), source=plain)
    deaf = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(Dropped, match="empty_response"):
        read(pair([ASK]), source=deaf)


def test_content_that_is_no_text_is_named():
    for content in (3, [3], {"a": 1}):
        with pytest.raises(DataError, match="rows:1: column 'prompt': the content"):
            read(pair([{"role": "user", "content": content}]))
    parts = [{"type": "text", "text": "How warm?"}]
    source = SEEING.replace(
        "m.content or ''", "m.content[0].text if m.content is not string else m.content"
    )
    assert (
        "<|user|>How warm?<|end|>"
        in read(pair([{"role": "user", "content": parts}]), source=source).prompt
    )


def test_what_asks_for_the_date_gets_a_fixed_one():
    assert (
        ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render([ASK], add_generation_prompt=True)
        == "2024-07-26"
    )


# --- tokens ---------------------------------------------------------------------------------------

NAMES = ("<s>", "<|end|>", "<|user|>", "<|assistant|>")
PREPEND = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
KINDS = {
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes with a space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "never": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    "prepend": (PREPEND, None),
}


def save_tokenizer(
    folder, kind, *, normalized=False, lstrip=False, rstrip=False, names=NAMES, **config
):
    """A tokenizer of single characters and some merges, with special tokens."""
    normalizer, pre_tokenizer = KINDS[kind]
    characters = sorted(
        {*map(chr, range(32, 127)), *pre_tokenizers.ByteLevel.alphabet(), "\n", "\u2581"}
    )
    pairs = [
        ("Y", "e"),
        ("\u2581", "Y"),
        ("\u0120", "Y"),
        ("\u2581Y", "e"),
        ("\u0120Y", "e"),
        ("Ye", "s"),
    ]
    vocab = {piece: i for i, piece in enumerate([*characters, *(a + b for a, b in pairs)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel() if kind.startswith("bytes") else decoders.Metaspace()
    flags = dict(lstrip=lstrip, rstrip=rstrip, normalized=normalized)
    tokenizer.add_special_tokens([AddedToken(name, **flags) for name in names])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "<|end|>"} | config)
    )
    return tokenizer


GLUED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPACED = GLUED.replace("|>", "|>\n").replace("<|end|>", " <|end|>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_same_ids_in_the_history_and_as_a_response(kind, tmp_path):
    for n, flags in enumerate(itertools.product((False, True), repeat=3)):
        options = dict(zip(("normalized", "lstrip", "rstrip"), flags, strict=True))
        save_tokenizer(tmp_path / str(n), kind, **options)
        tokenizer = load_tokenizer(str(tmp_path / str(n)))
        end, assistant = tokenizer.specials()["<|end|>"], tokenizer.specials()["<|assistant|>"]
        for source, words in itertools.product((GLUED, SPACED), ("Yes.", " Yes no ", "Yes\n\nYes")):
            turns = [ASK, {"role": "assistant", "content": words}]
            row = {"chosen": [*turns, *turns], "rejected": [*turns, ASK, ANSWER]}
            text = RowReader("", chat=ChatTemplate(source)).read(row, "x")
            group, _ = tokenize(text, tokenizer, Limits(1000, 1000), 0)
            prompt, response = group.prompt.tolist(), group.responses[0].tolist()
            assert [prompt.count(end), response.count(end)] == [3, 1], (options, source, words)
            first = prompt.index(assistant)
            history = prompt[first + 1 : prompt.index(end, first) + 1]
            header = prompt[prompt.index(assistant, first + 1) + 1 :]
            assert history == header + response[: response.index(end) + 1], (options, source, words)
            # No token straddles prompt and response here, so that the whole dialogue has the same
            # ids.
            assert (
                prompt + response == tokenizer.encode_chat(f"{text.prompt}{text.responses[0]}")[0]
            )


def test_masks_find_the_words_after_a_special_token(tmp_path):
    save_tokenizer(tmp_path, "first", rstrip=True)
    tokenizer = load_tokenizer(str(tmp_path))
    text = RowReader("", chat=ChatTemplate(GLUED)).read(pair([ASK]), "x")
    group, _ = tokenize(text, tokenizer, Limits(100, 100), 0, mask_template=True)
    assert group.counted is not None
    for ids, counted, words in zip(group.responses, group.counted, ("4.", "Warm."), strict=True):
        assert tokenizer.decode(ids[counted].tolist()) == words


def test_tokens_that_only_the_config_adds_are_tokens(tmp_path):
    size = save_tokenizer(tmp_path, "bytes", names=NAMES[:3]).get_vocab_size()
    added = {
        str(size): {"content": "<|assistant|>", "special": True},
        str(size + 1): {"content": "<think>", "special": False},
    }
    config = {"bos_token": "<s>", "eos_token": "<|end|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == size + 2 and any(
        "<|assistant|>" in note for note in tokenizer.notes
    )
    ids, _ = tokenizer.encode_chat("a<|assistant|><think>")
    assert ids[1:] == [size, size + 1] and tokenizer.decode([size + 1]) == "<think>"
    config["added_tokens_decoder"] = {str(size + 7): {"content": "<|assistant|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=rf"tokenizer_config\.json: the token '<\|assistant\|>' .* id {size + 7}"
    ):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_named_token_that_the_vocabulary_lacks_is_named_with_its_file(
    key, file, tmp_path, shared_data
):
    save_tokenizer(tmp_path, "first")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / file).write_text(
        json.dumps({"eos_token": "<|end|>", key: {"content": "<|im_end|>"}})
    )
    with pytest.raises(ConfigError, match=rf"{file}: {key} is '<\|im_end\|>'"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(
        (shared_data / "tokenizers/llama2/tokenizer.model").read_bytes()
    )
    (tmp_path / file).write_text(json.dumps({key: "<|im_end|>"}))
    with pytest.raises(ConfigError, match=rf"{file}: {key} is '<\|im_end\|>'"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "source",
    ["{{ pad_token }}", "{{ messages[0].content }}<|eot_id|>", "{% if messages %}</s>{% endif %}"],
)
def test_a_special_text_of_the_template_that_the_vocabulary_lacks_is_named(source, tmp_path):
    save_tokenizer(tmp_path, "first", pad_token="[PAD]")
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(
        ConfigError, match=r"the chat template in .*: it writes .*(\[PAD\]|eot_id|</s>)"
    ):
        chat_template(load_tokenizer(str(tmp_path)))
    (tmp_path / "chat_template.jinja").write_text(GLUED)
    assert chat_template(load_tokenizer(str(tmp_path))) is not None


def test_files_that_contradict_each_other_are_said(tmp_path):
    save_tokenizer(tmp_path, "first", add_bos_token=True)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.bos_id is None and "add_bos_token=True" in tokenizer.notes[0]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_id == tokenizer.specials()["<s>"] and "taken: '<s>'" in tokenizer.notes[0]


def test_ids_without_a_piece_are_no_text(tmp_path, shared_data):
    save_tokenizer(tmp_path, "first")
    for place in (tmp_path, shared_data / "models/stories260K/tok512.bin"):
        tokenizer = load_tokenizer(str(place))
        ids = tokenizer.encode_prompt("Yes")
        assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == tokenizer.decode(ids)
        assert tokenizer.piece(10**6) == "<1000000>"


def test_with_tools_the_template_for_tools_writes_and_all_are_saved(tmp_path):
    save_tokenizer(tmp_path / "a", "first")
    (tmp_path / "a/additional_chat_templates").mkdir()
    (tmp_path / "a/chat_template.jinja").write_text(GLUED)
    (tmp_path / "a/additional_chat_templates/tool_use.jinja").write_text("T" + GLUED)
    (tmp_path / "a/additional_chat_templates/rag.jinja").write_text("R" + GLUED)
    listed = [{"name": "tool_use", "template": "T" + GLUED}, {"name": "default", "template": GLUED}]
    save_tokenizer(tmp_path / "b", "first", chat_template=listed)
    for folder in (tmp_path / "a", tmp_path / "b"):
        tokenizer = load_tokenizer(str(folder))
        (tmp_path / "saved").mkdir(exist_ok=True)
        tokenizer.save(tmp_path / "saved")
        for place in (tokenizer, load_tokenizer(str(tmp_path / "saved"))):
            reader = RowReader("", chat=chat_template(place))
            prompts = [
                reader.read(row, "x").prompt
                for row in (pair([ASK]), pair([ASK], tools=[{"name": "a"}]))
            ]
            assert prompts[1] == f"T{prompts[0]}"
    assert (tmp_path / "saved/additional_chat_templates/rag.jinja").is_file()
    (tmp_path / "a/chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="rag, tool_use, and none is the default"):
        chat_template(load_tokenizer(str(tmp_path / "a")))


# --- cuts -----------------------------------------------------------------------------------------


def cut(tmp_path, messages, limit, **more):
    """The text of a prompt within `limit` tokens, and what was cut."""
    save_tokenizer(tmp_path, "never", names=(*NAMES, "<|system|>", "<|tool|>"))
    tokenizer = load_tokenizer(str(tmp_path))
    source = "<s>{{ tools|tojson if tools }}" + GLUED
    group = RowReader("", chat=ChatTemplate(source)).read(pair(messages, **more), "x")
    tokens, found = tokenize(group, tokenizer, Limits(limit, 100), 0)
    assert len(tokens.prompt) <= limit
    assert tokenizer.decode(tokens.responses[0].tolist()) == "4."
    return "".join(tokenizer.piece(i) for i in tokens.prompt).replace("\u2581", " "), found


def test_a_prompt_that_is_too_long_loses_whole_turns_and_then_the_start_of_the_first_that_is_left(
    tmp_path,
):
    system = {"role": "system", "content": "Be kind."}

    def turn(n):
        return [
            {"role": "user", "content": f"Question {n}?"},
            {"role": "assistant", "content": f"Answer {n}."},
        ]

    messages = [system, *turn(1), *turn(2), *turn(3), {"role": "user", "content": "And then?"}]
    whole, found = cut(tmp_path, messages, 1000)
    assert (found.prompt, found.turns) == (0, 0) and whole.startswith(
        "<s><|system|>Be kind.<|end|><|user|>Question 1?"
    )
    for turns in (1, 2, 3):
        rest = "".join(
            f"<|user|>Question {n}?<|end|><|assistant|>Answer {n}.<|end|>"
            for n in range(turns + 1, 4)
        )
        expected = f"<s><|system|>Be kind.<|end|>{rest}<|user|>And then?<|end|><|assistant|>"
        size = 1 + 10 + (3 - turns) * (2 + 11 + 2 + 9) + 2 + 9 + 1
        text, found = cut(tmp_path, messages, size + 3)
        assert (text, found.turns) == (expected, 2 * turns) and found.prompt > 0
    text, found = cut(tmp_path, messages, 1 + 10 + 2 + 5 + 1)
    assert (
        text == "<s><|system|>Be kind.<|end|><|user|>then?<|end|><|assistant|>" and found.turns == 6
    )


def test_a_call_and_its_result_go_with_the_question_that_they_answer(tmp_path):
    call = {"role": "assistant", "content": "calls"}
    messages = [
        ASK,
        call,
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4."},
        ASK,
    ]
    text, found = cut(tmp_path, messages, 20)
    assert text == "<s><|user|>How warm?<|end|><|assistant|>" and found.turns == 4
    text, found = cut(
        tmp_path,
        [*messages[:2], {"role": "tool", "content": "x" * 50 + "warm"}, *messages[3:4], ASK],
        20,
    )
    assert text == "<s><|user|>How warm?<|end|><|assistant|>"
    text, _ = cut(tmp_path, [ASK, call, {"role": "tool", "content": "x" * 50 + "warm"}], 14)
    assert text.endswith("warm<|end|><|assistant|>") and text.startswith(
        "<s><|user|><|end|><|assistant|><|end|><|tool|>"
    )


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([{"role": "system", "content": "x" * 50}, ASK], {}),
        ([ASK], {"tools": [{"name": "x" * 50}]}),
        ([ASK], {"limit": 4}),
    ],
)
def test_what_cannot_be_cut_and_is_too_long_is_an_error(messages, more, tmp_path):
    limit = more.pop("limit", 30) if "limit" in more else 30
    with pytest.raises(DataError, match=f"longer than {limit} tokens"):
        cut(tmp_path, messages, limit, **more)


def test_the_audit_shows_what_is_cut_and_what_contradicts(tmp_path, capsys):
    save_tokenizer(tmp_path, "never", add_bos_token=True, chat_template="<s>" + GLUED)
    long = [ASK, ANSWER, ASK, ANSWER, {"role": "user", "content": "x" * 30}]
    rows = [pair(messages) for messages in ([ASK], [ASK, ANSWER, ASK], long)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        f"--data={tmp_path / 'rows.jsonl'}",
        f"--tokenizer={tmp_path}",
        "--max_prompt_tokens=20",
    ]
    assert audit.main(argv) == 0
    shown = capsys.readouterr()
    assert "add_bos_token=True" in shown.err
    for line in (
        "3 rows, 3 usable pairs",
        "2 prompts would be cut",
        "6 messages of dialogues would be left out whole",
        "1 dialogues would lose the start of the first message that is left",
    ):
        assert line in shown.out, line


def test_a_tokenizer_is_made_once_as_long_as_its_files_stay_the_same(tmp_path, monkeypatch):
    save_tokenizer(tmp_path, "first")
    first = load_tokenizer(str(tmp_path))
    made = []
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", lambda text: made.append(text))
    again = pickle.loads(pickle.dumps(first))
    assert again.encode_chat("Yes<|end|>") == first.encode_chat("Yes<|end|>") and not made
    monkeypatch.undo()
    save_tokenizer(tmp_path, "first", eos_token="<s>")
    assert load_tokenizer(str(tmp_path)).eos_id == first.specials()["<s>"]
