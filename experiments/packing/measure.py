"""How near is packing to the ideal |x| + |y_w| + |y_l|? Batch 64, on one data shard and on eight.

    python experiments/packing/measure.py --tokenizer=llama2/tokenizer.model FILE[:template] ...

Prints tables: packing and rounding waste, from the same plan that training uses, on the first 20
steps of seed 0; and how many pairs a second are read, tokenised and packed, by threads and by two
worker processes, without a step that takes them.
"""

import argparse
import time

import numpy as np

from dpojax.data.batches import PackGroups, step_positions, train_batches
from dpojax.data.dataset import Dataset
from dpojax.data.index import Index, build_index
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.data.packing import PackShape
from dpojax.data.records import open_records
from dpojax.data.row_plan import plan_step, waste
from dpojax.data.rows import RowReader
from dpojax.data.shapes import make_shape
from dpojax.data.tokens import Limits


def batches_per_second(
    data: Dataset, index: Index, shape: PackShape, workers: int, count: int = 30
) -> float:
    """Batches a second of the stream that training reads, after the first."""
    pack = PackGroups(data, index, shape, (0,), pad_id=0)
    stream = train_batches(
        pack, num_groups=64, seed=0, shuffle=True, start=0, stop=count + 1, workers=workers
    )
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--micro_batch_tokens", type=int, default=4096)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    print(
        "| data | shards | row tokens | packing waste | rounding waste | computed / padded pairs |"
    )
    print("|---|---|---|---|---|---|")
    speeds = []
    for spec in args.files:
        path, _, template = spec.partition(":")
        data = Dataset(
            open_records(path),
            RowReader(template),
            load_tokenizer(args.tokenizer),
            Limits(512, 512),
        )
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
            if shards == 1:
                speeds.append(
                    [
                        path.rsplit("/", 1)[-1],
                        *(64 * batches_per_second(data, index, shape, n) for n in (0, 2)),
                    ]
                )
            steps = step_positions(index, num_groups=64, seed=0, shuffle=True)
            wastes, padded, computed = [], 0, 0
            for step in range(20):
                groups = steps[step]
                assert groups is not None  # the stream has no end
                prompts = [int(index.prompt_lengths[i]) for i in groups]
                responses = [index.responses(i) for i in groups]
                plan = plan_step(prompts, responses, shape)
                wastes.append(waste(plan, shape))
                computed += len(plan.cells) * shards * shape.shard_rows * shape.row_tokens
                padded += (
                    2
                    * len(groups)
                    * max(x + max(ys) for x, ys in zip(prompts, responses, strict=True))
                )
            packing, rounding = np.mean(wastes, axis=0)
            name = path.rsplit("/", 1)[-1]
            print(
                f"| {name} | {shards} | {shape.row_tokens} | {packing:.3f} | {rounding:.3f} |"
                f" {computed / padded:.2f} |"
            )
    print("\n| data | pairs a second, threads | two worker processes |\n|---|---|---|")
    for name, threads, workers in speeds:
        print(f"| {name} | {threads:,.0f} | {workers:,.0f} |")


if __name__ == "__main__":
    main()
