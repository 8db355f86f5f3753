"""How near is packing to the ideal |x| + |y_w| + |y_l|? Batch 64, on one data shard and on eight.

    python experiments/packing/measure.py --tokenizer=llama2/tokenizer.model FILE[:template] ...

Prints a table: packing and rounding waste, from the same plan that training uses, on the first 20 steps of seed 0.
"""

import argparse

import numpy as np

from dpojax.data.index import Dataset, build_index
from dpojax.data.packing import plan_step, waste
from dpojax.data.pipeline import make_shape, step_positions
from dpojax.data.records import open_records
from dpojax.data.tokens import Limits, load_tokenizer
from dpojax.data.triples import RowReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    print("| data | shards | row tokens | packing waste | rounding waste | computed / padded pairs |")
    print("|---|---|---|---|---|---|")
    for spec in args.files:
        path, _, template = spec.partition(":")
        data = Dataset(open_records(path), RowReader(template), load_tokenizer(args.tokenizer), Limits(512, 512))
        index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
        for shards in (1, 8):
            shape = make_shape(
                [index],
                layout="shared",
                num_groups=64,
                num_shards=shards,
                micro_batch_tokens=args.micro_batch_tokens,
                row_tokens=0,
            )
            steps = step_positions(index, num_groups=64, seed=0, shuffle=True)
            found, padded, computed = [], 0, 0
            for step in range(20):
                own = steps[step]
                prompts, responses = [int(index.prompt_lengths[i]) for i in own], [index.responses(i) for i in own]
                plan = plan_step(prompts, responses, shape)
                found.append(waste(plan, shape))
                computed += len(plan.cells) * shards * shape.shard_rows * shape.row_tokens
                padded += 2 * len(own) * max(x + max(ys) for x, ys in zip(prompts, responses, strict=True))
            packing, rounding = np.mean(found, axis=0)
            name = path.rsplit("/", 1)[-1]
            print(f"| {name} | {shards} | {shape.row_tokens} | {packing:.3f} | {rounding:.3f} | {computed / padded:.2f} |")


if __name__ == "__main__":
    main()
