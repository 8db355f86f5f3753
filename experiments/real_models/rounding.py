"""What storing a frozen model in fewer bits does to its log-probs: a table, on real preferences.

    python experiments/real_models/rounding.py --model=DIR --data=FILE

Every row of the data is scored by the float32 model and by the same with its layers' matrices in
bfloat16, int8, fp8 and nf4.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from dpojax import score
from dpojax.evaluation.score_passes import response_logps
from dpojax.generation.loaded import load_model
from dpojax.models.quantise import QTYPES, quantise_params


def main() -> None:
    parser = score.parser()
    parser.description = __doc__
    parser.set_defaults(limit=200, max_prompt_tokens=512, max_response_tokens=128)
    args: argparse.Namespace = parser.parse_args()
    data, index = score.read_rows(args)
    loaded = load_model(args.model, args)

    def logps(params):
        return np.concatenate(
            response_logps(loaded._replace(params=params), data, index, args, args.model)
        )

    exact, tokens = logps(loaded.params), index.response_lengths

    def size(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree["layers"]))

    print(
        f"\n{len(exact)} responses of {len(index.rows)} rows, {tokens.sum():,} tokens, float32 mean"
        f" {exact.sum() / tokens.sum():.3f} nats a token"
    )
    print(
        "| layers in | size | per token: mean error | of a response: mean | largest"
        " |\n|---|---|---|---|---|"
    )
    for kind in ("bfloat16", *QTYPES):
        if kind in QTYPES:
            params = quantise_params(loaded.params, loaded.config, kind)
        else:
            layers = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params["layers"])
            params = {**loaded.params, "layers": layers}
        error = np.abs(logps(params) - exact)
        small = size(params) / size(loaded.params)
        print(
            f"| {kind} | {small:.2f} | {np.mean(error / tokens):.4f} | {error.mean():.3f} |"
            f" {error.max():.3f} nats |"
        )


if __name__ == "__main__":
    main()
