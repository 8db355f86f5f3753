"""Group -> TokenGroup: token ids with BOS, EOS and truncation. Text ends here.

BOS stands once, at the start of the prompt; EOS ends every response that was not cut. A response is
encoded as the continuation of its prompt: no dummy prefix, no BOS. Limits count BOS and EOS. Text
by a chat template holds its special tokens itself, BOS and ends of turns included; nothing is added
to it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data.chat import Message
from dpojax.data.dialogues import rewrite_group
from dpojax.data.groups import Dropped, Group, keep_sound
from dpojax.data.token_groups import TokenGroup
from dpojax.data.tokenizers import Tokenizer
from dpojax.errors import ConfigError, DataError


class Limits(NamedTuple):
    """The longest prompt (BOS included) and response (EOS included), in tokens."""

    prompt: int
    response: int


class Cut(NamedTuple):
    """What was taken from a group: by truncation, in tokens, and pairs."""

    prompt: int
    responses: tuple[int, ...]
    # the reason of each pair that was left out while others of its group stay
    dropped: tuple[str, ...]
    # tokens of prompt, chosen and rejected of every pair before truncation
    uncut_lengths: tuple[tuple[int, int, int], ...] = ()
    turns: int = 0  # messages of a dialogue that were left out whole
    content: int = 0  # tokens that the first messages that are left lost of their contents


def prompt_ids(
    prompt: str | Sequence[int], tokenizer: Tokenizer | None, limit: int
) -> tuple[list[int], int]:
    """The prompt's ids and how many were cut: from the left, BOS kept."""
    if not isinstance(prompt, str):
        return list(prompt), 0  # ready ids are used as they are
    assert tokenizer is not None
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode_prompt(prompt)
    cut = max(0, len(first) + len(ids) - limit)
    return first + ids[cut:], cut


class Fitted(NamedTuple):
    """A dialogue's prompt within its limit."""

    ids: list[int]
    group: Group  # written anew where messages were cut
    cut: int  # tokens that the prompt lost
    turns: int  # messages that were left out whole
    content: int  # tokens of `cut` that were the start of a content


def chat_prompt(group: Group, tokenizer: Tokenizer, limit: int) -> Fitted:
    """The ids of a dialogue's prompt, cut where it is too long.

    The template around what stays is whole.

    The oldest turns after the system's go first, each from a user's message up to the next; then
    the start of the content of the first message that is left.

    Raises: DataError if what cannot be cut is longer than the limit: the template's own text, tools
      and system messages.
    """
    assert isinstance(group.prompt, str) and group.dialogue is not None
    ids, _ = tokenizer.encode_chat(group.prompt)
    if len(ids) <= limit:
        return Fitted(ids, group, 0, 0, 0)
    messages = list(group.dialogue.messages)
    # messages in front of the first turn, which stay
    num_leading = next(
        (i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")),
        len(messages),
    )
    users = [i for i in range(num_leading, len(messages)) if messages[i]["role"] == "user"]

    def rewrite(kept: Sequence[Message]) -> tuple[list[int], Group]:
        written = rewrite_group(group, [*messages[:num_leading], *kept])
        return tokenizer.encode_chat(str(written.prompt))[0], written

    starts = [i for i in users if i > num_leading]  # where the first turn that stays may start
    written = group
    kept = messages[num_leading:]
    low = 0
    high = len(starts)
    while low < high:  # the fewest turns that must go; the last one stays
        middle = (low + high) // 2
        shorter, candidate = rewrite(messages[starts[middle] :])
        if len(shorter) <= limit:
            high = middle
        else:
            low = middle + 1
    if starts:
        kept = messages[starts[min(low, len(starts) - 1)] :]
        shorter, written = rewrite(kept)
    else:
        shorter = ids
    turns = len(messages) - num_leading - len(kept)
    uncut = len(shorter)
    if uncut > limit:
        shorter, written = _cut_content(kept, rewrite, tokenizer, uncut - limit, limit)
    return Fitted(shorter, written, len(ids) - len(shorter), turns, uncut - len(shorter))


def _cut_content(kept: Sequence[Message], rewrite, tokenizer: Tokenizer, over: int, limit: int):
    """The prompt without the start of its contents.

    `over` tokens are left out, or as many more as it takes; some of the last message stays.
    """
    kept = list(kept)
    for place, message in enumerate(kept):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            continue
        ids, _ = tokenizer.encode_chat(content, before="a")
        while over < len(ids):
            kept[place] = {
                **message,
                "content": _without_start(content, ids, over, tokenizer).lstrip(),
            }
            shorter, written = rewrite(kept)
            if len(shorter) <= limit:
                return shorter, written
            over += len(shorter) - limit
        kept[place] = {**message, "content": ""}
        over -= len(ids)
    raise DataError(
        f"the prompt is longer than {limit} tokens, also without the contents of its turns: its"
        " system text, its tools and the template cannot be cut; raise data.max_prompt_tokens, or"
        " leave the row out"
    )


def _without_start(text: str, ids: Sequence[int], count: int, tokenizer: Tokenizer) -> str:
    """The text of the tokens of `text` after the first `count`."""
    end = tokenizer.decode(ids[count:])
    if text.endswith(end) and end:
        return end
    # slower, but right where a character is cut in two
    _, spans = tokenizer.encode_chat(text, before="a", spans=True)
    return text[spans[count][0] :]


def response_ids(
    response: str | Sequence[int], tokenizer: Tokenizer | None, limit: int
) -> tuple[list[int], int]:
    """The response's ids, and how many were cut from the right.

    EOS stands at the end unless it was cut.
    """
    if not isinstance(response, str):
        return list(response), 0  # ready ids are used as they are
    assert tokenizer is not None
    ids = [*tokenizer.encode_continuation(response), tokenizer.eos_id]
    return ids[:limit], max(0, len(ids) - limit)


def chat_response_ids(
    response: str,
    content: tuple[int, int] | None,
    tokenizer: Tokenizer,
    limit: int,
    *,
    before: str,
    mask: bool,
) -> tuple[list[int], int, np.ndarray | None]:
    """As `response_ids`, of a chat template's text after the text `before`.

    With `mask` also which tokens are the message's own words.
    """
    ids, spans = tokenizer.encode_chat(response, before=before, spans=mask)
    is_content = None
    if mask:
        start, stop = content or (0, len(response))
        is_content = np.asarray([a < stop and b > start for a, b in spans], bool)[:limit]
    return ids[:limit], max(0, len(ids) - limit), is_content


def mask_ids(names: str, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids of comma-separated pieces.

    Raises ConfigError for one that the tokenizer does not have.
    """
    wanted = [n for n in names.split(",") if n]
    if not wanted:
        return frozenset()
    if tokenizer is None:
        raise ConfigError(
            f"data.mask_tokens={names!r}: the rows are token ids; give them chosen_mask and"
            " rejected_mask columns"
        )
    ids = set()
    for name in wanted:
        piece = tokenizer.piece_id(name)
        if piece is None:
            raise ConfigError(f"data.mask_tokens: the tokenizer has no piece {name!r}")
        ids.add(piece)
    return frozenset(ids)


def _counted(
    responses: Sequence[np.ndarray], masks: Sequence[Sequence[int]] | None, masked: frozenset[int]
):
    """Which tokens of each response count: those that neither the row nor the settings mask.

    None: all.
    """
    if not masked and masks is None:
        return None
    counted = tuple(~np.isin(r, list(masked)) for r in responses)
    if masks is not None:
        counted = tuple(c & np.asarray(m, bool) for c, m in zip(counted, masks, strict=True))
    return counted


def tokenize(
    group: Group,
    tokenizer: Tokenizer | None,
    limits: Limits,
    row: int,
    masked: frozenset[int] = frozenset(),
    mask_template: bool = False,
) -> tuple[TokenGroup, Cut]:
    """Token ids of a group, and what was cut of it.

    Args:
      masked: the ids of formatting tokens, which do not count.
      mask_template: what a chat template adds does not count either.
    Raises: Dropped if truncation made the two sides of a pair the same, or nothing is left to
      predict from; DataError where the words of a message are to be told from what a template adds,
      and it changed them.
    """
    turns = content_cut = 0
    if group.contents is None:
        prompt, prompt_cut = prompt_ids(group.prompt, tokenizer, limits.prompt)
        plain = [response_ids(r, tokenizer, limits.response) for r in group.responses]
        responses = tuple(ids for ids, _ in plain)
        cuts = tuple(cut for _, cut in plain)
    else:
        assert tokenizer is not None
        prompt, group, prompt_cut, turns, content_cut = chat_prompt(group, tokenizer, limits.prompt)
        if mask_template and None in (group.contents or ()):
            raise DataError(
                "data.mask_template: the words of a message cannot be told from the chat template's"
                " text: it changes them, or writes other fields than the content"
            )
        texts = zip(map(str, group.responses), group.contents or (), strict=True)
        options = dict(before=str(group.prompt), mask=mask_template)
        read = [
            chat_response_ids(text, content, tokenizer, limits.response, **options)
            for text, content in texts
        ]
        responses = tuple(ids for ids, _, _ in read)
        cuts = tuple(cut for _, cut, _ in read)
        if mask_template:
            masks = tuple(tuple(mask.tolist()) for _, _, mask in read if mask is not None)
            group = group._replace(masks=masks)
    if not prompt:
        raise Dropped("empty_prompt")
    if not group.responses:  # a prompt alone, to be answered
        cut = Cut(prompt_cut, (), (), (), turns, content_cut)
        return TokenGroup(np.asarray(prompt, np.int32), (), (), row), cut
    arrays = [np.asarray(r, np.int32) for r in responses]
    counted = _counted(arrays, group.masks, masked)
    # What holds only formatting tokens has nothing to score, as if it were empty.
    scored = list(responses)
    for k, mask in enumerate(counted or ()):
        if not mask.any():
            scored[k] = []
    sizes = [len(response) + lost for response, lost in zip(arrays, cuts, strict=True)]
    uncut_lengths = tuple(
        (len(prompt) + prompt_cut, sizes[pair.chosen], sizes[pair.rejected]) for pair in group.pairs
    )
    try:
        sound = keep_sound(scored, group.pairs, had_pairs=bool(group.pairs))
    except Dropped as verdict:
        if prompt_cut or any(cuts):
            verdict.uncut_lengths = uncut_lengths
        raise
    arrays = tuple(arrays[i] for i in sound.kept)
    if counted is not None:
        counted = tuple(counted[i] for i in sound.kept)
    cut = Cut(prompt_cut, cuts, group.dropped + sound.reasons, uncut_lengths, turns, content_cut)
    return TokenGroup(np.asarray(prompt, np.int32), arrays, sound.pairs, row, counted=counted), cut
