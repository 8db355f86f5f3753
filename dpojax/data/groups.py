"""What a row says: one prompt, its distinct responses and the preferences between them.

Or why the row is left out: `Dropped`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dpojax.data.chat import ChatTemplate, Context, Message
from dpojax.data.token_groups import TokenPair

# Reasons to drop a pair; each is counted, and the audit shows examples.
DROPPED = {
    "empty_prompt": "the prompt is empty",
    "empty_response": "a response is empty, or only white space or formatting tokens",
    "identical": "chosen and rejected are the same",
    "prompt_mismatch": "chosen and rejected answer different prompts",
    "role_order": "a dialogue does not end in an assistant's answer to somebody",
    "no_preference": "no two responses have different scores",
    "conflicting_scores": "equal responses have different scores",
    "special_token": (
        "a message spells a special token of the tokenizer, which its chat template would pass on"
        " as one"
    ),
    "too_large": "a weight, score, rank or margin is larger than float32 holds",
    "undesirable": "the response is labelled as a bad one, and SFT learns good ones",
}


class Dropped(Exception):  # noqa: N818  # not an error: a verdict
    """A row that is read well but holds no usable preference; `reason` is a key of DROPPED."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
        # Where truncation made it so: tokens of prompt, chosen and rejected of every pair before
        # truncation.
        self.uncut_lengths: tuple[tuple[int, int, int], ...] | None = None


class Dialogue(NamedTuple):
    """What a chat template wrote a prompt from, so that a shorter one can be written."""

    chat: ChatTemplate
    messages: tuple[Message, ...]
    context: Context


class Group(NamedTuple):
    """One prompt, its distinct responses, and the preferences between them."""

    prompt: str | tuple[int, ...]
    responses: tuple[str | tuple[int, ...], ...]
    pairs: tuple[TokenPair, ...]
    dropped: tuple[str, ...] = ()  # the reason of each pair that was left out, keys of DROPPED
    # of each response's ids: 0 at formatting tokens
    masks: tuple[tuple[int, ...], ...] | None = None
    # By a chat template: where the message's own words stand in each response. The texts hold all
    # special tokens themselves.
    contents: tuple[tuple[int, int] | None, ...] | None = None
    answers: tuple[Message, ...] | None = None  # the message of each response
    dialogue: Dialogue | None = None

    def pick(self, places: Sequence[int]) -> "Group":
        """The responses at `places` with all that belongs to them, without pairs."""

        def picked(values):
            if values is None:
                return None
            return tuple(values[i] for i in places)

        return self._replace(
            responses=picked(self.responses) or (),
            pairs=(),
            masks=picked(self.masks),
            contents=picked(self.contents),
            answers=picked(self.answers),
        )


class Sound(NamedTuple):
    """What `keep_sound` kept, and the reason of each pair that it left out."""

    responses: tuple
    pairs: tuple[TokenPair, ...]
    reasons: tuple[str, ...]
    kept: tuple[int, ...]  # which of the responses stayed


def keep_sound(responses: Sequence, pairs: Sequence[TokenPair], *, had_pairs: bool) -> Sound:
    """Leaves out empty responses with their pairs, and pairs of equal responses.

    Raises: Dropped if nothing is left: no response, or no pair of a group that had some.
    """
    empty = {i for i, response in enumerate(responses) if is_empty(response)}
    kept = []
    reasons = []
    for p in pairs:
        if p.chosen in empty or p.rejected in empty:
            reasons.append("empty_response")
        elif p.chosen != p.rejected and responses[p.chosen] == responses[p.rejected]:
            reasons.append("identical")
        else:
            kept.append(p)
    # Only responses that are trained on stay: those of a pair, or all sound ones where there never
    # was a pair.
    if had_pairs:
        used = sorted({i for p in kept for i in (p.chosen, p.rejected)})
    else:
        used = sorted(set(range(len(responses))) - empty)
    if not used:
        raise Dropped([*reasons, "empty_response"][0])
    place = {old: new for new, old in enumerate(used)}
    moved = tuple(p._replace(chosen=place[p.chosen], rejected=place[p.rejected]) for p in kept)
    return Sound(tuple(responses[i] for i in used), moved, tuple(reasons), tuple(used))


def is_empty(response: str | Sequence[int]) -> bool:
    """Whether a response has no ids, or no text but white space."""
    if isinstance(response, str):
        return not response.strip()
    return len(response) == 0
