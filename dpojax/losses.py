"""The objectives under their short names: `dpojax.losses.make_loss`, one function per paper, and
the table of them.

>>> sorted(name for name in dpojax.OBJECTIVES if "ipo" in name)
['ipo', 'tr_ipo']
>>> dpojax.losses.OBJECTIVES["kto"].data
'unpaired'
"""

from dpojax.objectives.f_divergences import F_DIVERGENCES as F_DIVERGENCES
from dpojax.objectives.loss import Loss as Loss
from dpojax.objectives.loss import LossOutput as LossOutput
from dpojax.objectives.loss import make_loss as make_loss
from dpojax.objectives.pairs import PairInfo as PairInfo
from dpojax.objectives.pairs import PairLogps as PairLogps
from dpojax.objectives.pairs import Pairs as Pairs
from dpojax.objectives.pairs import ResponseLogps as ResponseLogps
from dpojax.objectives.pairs import pair_logps as pair_logps
from dpojax.objectives.preference import *  # noqa: F403
from dpojax.objectives.table import OBJECTIVES as OBJECTIVES
from dpojax.objectives.table import Objective as Objective
