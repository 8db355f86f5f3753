"""Exact optima of every objective on response spaces small enough to enumerate: see
`dpojax.objectives.exact`.

>>> ref = np.log([0.5, 0.5])  # of two responses
>>> np.exp(dpojax.exact.optimal_logps(ref, [np.log(3), 0.0], beta=1.0)).round(4).tolist()
[0.75, 0.25]
"""

from dpojax.objectives.exact import *  # noqa: F403
from dpojax.objectives.exact_policy import best_of_n as best_of_n
from dpojax.objectives.exact_policy import best_of_n_kl as best_of_n_kl
from dpojax.objectives.exact_policy import grpo_factor as grpo_factor
from dpojax.objectives.exact_policy import k3_fixed_point as k3_fixed_point
from dpojax.objectives.exact_policy import policy_gradient as policy_gradient
from dpojax.objectives.exact_policy import tilted_frontier as tilted_frontier
from dpojax.objectives.exact_tokens import gae as gae
