"""Chat templates and the ids of dialogues against transformers: the templates that TRL brings, on
dialogues of every kind.
"""

import importlib.util
import itertools
import json
import pathlib
import re
import shutil
from typing import Any

import pytest
from shared_data import DATA

from dpojax.data.chat import ChatTemplate, Context
from dpojax.data.open_tokenizer import chat_template, load_tokenizer
from dpojax.data.rows import RowReader
from dpojax.data.template_sandbox import FIXED_DATE, TemplateError
from dpojax.data.tokens import Limits, tokenize

has_oracles = all(importlib.util.find_spec(m) for m in ("transformers", "trl"))
needs_oracles = pytest.mark.skipif(
    not has_oracles, reason="transformers and TRL are not installed: pip install .[parity]"
)

CITY = {"type": "string", "description": "It's <b>one</b>", "enum": ["Oslo", "Rome"]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What the weather is.",
            "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
        },
    }
]
CALLS = [
    {
        "type": "function",
        "id": "c12345678",
        "function": {"name": "weather", "arguments": {"city": "Oslo"}},
    }
]
SYSTEM, ASK = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How warm is it in Oslo?"},
)
ANSWER, RESULT = (
    {"role": "assistant", "content": "It is 4."},
    {"role": "tool", "name": "weather", "tool_call_id": "c12345678"},
)
TEXT_PARTS = [{"type": "text", "text": "How "}, {"type": "text", "text": "warm?"}]
DIALOGUES = {
    "one turn": ([ASK, ANSWER], None),
    "system": ([SYSTEM, ASK, ANSWER], None),
    "turns": (
        [
            ASK,
            ANSWER,
            {"role": "user", "content": "  And Rome?\n"},
            {"role": "assistant", "content": " Warm. \n"},
        ],
        None,
    ),
    "a call": ([SYSTEM, ASK, {"role": "assistant", "content": "", "tool_calls": CALLS}], TOOLS),
    "a call without content, and its result": (
        [
            ASK,
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {**RESULT, "content": "4"},
            ANSWER,
        ],
        TOOLS,
    ),
    "reasoning": ([ASK, {**ANSWER, "reasoning_content": "I know it."}], None),
    "reasoning by other names": (
        [ASK, {**ANSWER, "thinking": "Hm."}, ASK, {**ANSWER, "reasoning": "Hm, hm."}],
        None,
    ),
    "parts": ([{"role": "user", "content": TEXT_PARTS}, ANSWER], None),
    "other scripts": (
        [
            {"role": "user", "content": '日本語 é {{ "q" }}'},
            {"role": "assistant", "content": "🙂\n\n```py\nx = 1\n```"},
        ],
        None,
    ),
}
TOKENS = (
    r"<\|[^|<>\s'\"{]+\|>|</?s>|</?(?:bos|eos|think|tool_call)>|<(?:start|end)_of_turn>|\[/?INST\]"
)


def public_templates():
    """The chat templates that TRL brings, in the order of their names."""
    spec = importlib.util.find_spec("trl")
    folder = (
        pathlib.Path(str(spec.origin)).parent / "chat_templates"
        if spec
        else pathlib.Path("nowhere")
    )
    return sorted(folder.glob("*.jinja"))


@pytest.fixture(scope="module")
def tokenizer_pairs(tmp_path_factory):
    """Tokenizers of three kinds, which all templates' tokens were added to, as dpojax and as
    transformers read them.
    """
    import transformers

    if not DATA.is_dir():
        pytest.skip(f"real data is not at {DATA}; set DPOJAX_TEST_DATA")
    names = sorted(
        {name for path in public_templates() for name in re.findall(TOKENS, path.read_text())}
    )
    pairs = {}
    for kind in ("tokenizers/gpt-neox", "tokenizers/tinyllama", "models/TinyStories-656K"):
        folder = tmp_path_factory.mktemp("tokenizer")
        shutil.copyfile(DATA / kind / "tokenizer.json", folder / "tokenizer.json")
        path = DATA / kind / "tokenizer_config.json"
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
        }
        config = json.loads(path.read_text()) if path.is_file() else config
        spec = json.loads((folder / "tokenizer.json").read_text())
        known = {token["content"]: token["id"] for token in spec["added_tokens"]}
        vocabulary = spec["model"]["vocab"]
        first = max([*known.values(), *vocabulary.values()]) + 1
        new = [name for name in names if name not in known and name not in vocabulary]
        # Flags of all kinds; <think> and its like are no special tokens, as with Qwen.
        flags = [
            dict(special="|" in n, normalized=i % 2 == 0, rstrip=i % 3 == 0, lstrip=i % 5 == 0)
            for i, n in enumerate(new)
        ]
        table = {
            first + i: {"content": name, "single_word": False, **flags[i]}
            for i, name in enumerate(new)
        }
        table |= {token.pop("id"): token for token in spec["added_tokens"]}
        config["added_tokens_decoder"] = {str(i): table[i] for i in sorted(table)}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        pairs[kind] = (
            load_tokenizer(str(folder)),
            transformers.AutoTokenizer.from_pretrained(folder),
        )
    return pairs


@pytest.mark.parity
@needs_oracles
@pytest.mark.parametrize("path", public_templates(), ids=lambda path: path.stem)
def test_dialogues_are_those_of_transformers_to_the_character_and_the_id(tokenizer_pairs, path):
    from transformers.utils import chat_template_utils

    source = path.read_text()
    # dpojax shows no date; where a template asks for one in any case, it is always the same.
    environment = chat_template_utils._compile_jinja_template(source).environment
    environment.globals.pop("strftime_now", None)
    if "strftime_now" in source and "strftime_now is defined" not in source:
        chat_template_utils._compile_jinja_template(source).globals["strftime_now"] = (
            FIXED_DATE.strftime
        )
    written = 0
    for (name, (messages, tools)), (kind, (ours, theirs)) in itertools.product(
        DIALOGUES.items(), tokenizer_pairs.items()
    ):
        template = ChatTemplate(source, tuple(theirs.special_tokens_map.items()))
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        texts = []
        for dialogue, asks in ((plain[:-1], True), (plain, False)):
            options = dict(tools=tools, chat_template=source, add_generation_prompt=asks)
            try:
                expected = theirs.apply_chat_template(dialogue, tokenize=False, **options)
            except Exception:  # a template refuses by any exception
                with pytest.raises(TemplateError):
                    template.render(dialogue, add_generation_prompt=asks, context=Context(tools))
                continue
            texts.append(
                template.render(dialogue, add_generation_prompt=asks, context=Context(tools))
            )
            assert texts[-1] == expected, name
            ids = theirs.apply_chat_template(dialogue, return_dict=False, **options)
            assert ours.encode_chat(texts[-1])[0] == ids, (name, kind)
            written += 1
        if len(texts) == 2 and texts[1].startswith(texts[0]):
            prompt, _ = ours.encode_chat(texts[0])
            response, _ = ours.encode_chat(texts[1][len(texts[0]) :], before=texts[0])
            if prompt == ids[: len(prompt)]:  # no token of the whole straddles the two
                assert prompt + response == ids, (name, kind)
    assert written >= 9


@pytest.mark.parity
@needs_oracles
@pytest.mark.parametrize("name", ["tinyllama", "llama2"])
def test_real_dialogues_have_transformers_ids(shared_data, tmp_path, name):
    import transformers

    folder = tmp_path / name
    shutil.copytree(shared_data / "tokenizers" / name, folder)
    if name == "llama2":
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
        }
        config["chat_template"] = (
            "{{ bos_token }}{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}"
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    reader = RowReader("", chat=chat_template(ours))
    for line in (shared_data / "ultrafeedback/messages_sample.jsonl").read_text().splitlines():
        # transformers makes merges of its own from a bare sentencepiece model, which split runs of
        # spaces otherwise.
        row = json.loads(line if name == "tinyllama" else re.sub(" {2,}", " ", line))
        group, _ = tokenize(reader.read(row, "x"), ours, Limits(10**6, 10**6), 0)
        for key, response in zip(("chosen", "rejected"), group.responses, strict=True):
            assert [*group.prompt, *response] == theirs.apply_chat_template(
                row[key], return_dict=False
            ), row
