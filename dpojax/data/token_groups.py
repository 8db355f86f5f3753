"""What a row of preferences becomes: token groups.

They name no array library, so that reading rows needs none.
"""

from typing import NamedTuple

import numpy as np


class TokenPair(NamedTuple):
    """A preference between two responses of one group, by their positions in it.

    Unpaired data: `chosen` is the labelled response and `soft_label` its label; `rejected` is the
    group's mismatched response where the objective needs one, else the labelled response again.
    """

    chosen: int
    rejected: int
    weight: float
    soft_label: float  # probability that `chosen` is the better one
    margin: float  # score of chosen minus score of rejected; 0 where there is no score


class TokenGroup(NamedTuple):
    """One prompt with its responses as token ids, ready to be packed."""

    prompt: np.ndarray  # [|x|], at least one token
    responses: tuple[np.ndarray, ...]  # [|y_k|] each, at least one token
    pairs: tuple[TokenPair, ...]
    row: int  # of the source, to name it later
    ref_logps: tuple[np.ndarray, ...] | None = None  # [|y_k|] each, nats: the cached reference
    # [|y_k|] each, bool: False at formatting tokens; None: all count
    counted: tuple[np.ndarray, ...] | None = None
