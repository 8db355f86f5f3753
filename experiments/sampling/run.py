"""How fast are responses drawn on a CPU, against transformers' generate and the machine's bound?

    python experiments/sampling/run.py --model=SMOLLM2 --data=tldr/validation.jsonl.gz

The same weights in float32, temperature 1, real prompts, best of some rounds in which both take
turns. Needs torch and transformers: pip install .[parity]
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import dpojax
from dpojax.data.records import open_records
from dpojax.generation.batching import least_half, pack_prompts
from dpojax.generation.decoding import SampleSettings, compile_sampler
from dpojax.generation.sampler import (
    draw,
    fetch_whole,
    prompt_width,
    rows_put,
)
from dpojax.models.params import num_params


class Setting(NamedTuple):
    """What is drawn."""

    name: str
    prompts: int
    samples: int
    new_tokens: int
    ragged: bool  # whether responses end at lengths of their own


SETTINGS = (
    Setting("16 prompts x 1", 16, 1, 48, ragged=False),
    Setting("4 prompts x 8", 4, 8, 48, ragged=False),
    Setting("16 prompts x 1, ragged", 16, 1, 256, ragged=True),
)


def own_length(first: int) -> int:
    """The length of a ragged response, by its first token: 8 to 256, most of them short."""
    share = (first * 2654435761 % 2**32) / 2**32
    return int(8 * 32**share)


def response_length(setting: Setting, ids: list[int]) -> int:
    """How many tokens of a response count."""
    if setting.ragged:
        return own_length(ids[0])
    return setting.new_tokens


def read_prompts(path: str, count: int) -> list[str]:
    """The first distinct prompts of a file."""
    records = open_records(path)
    rows = (records.get(i) for i in range(records.size))
    prompts: dict[str, None] = {}
    for row in rows:
        prompts[row["prompt"]] = None
        if len(prompts) == count:
            break
    return list(prompts)


class Ours:
    """dpojax's sampler."""

    def __init__(self, folder: str):
        self.model = dpojax.open_model(folder)
        self.programs: dict[Setting, Any] = {}

    def settings(self, setting: Setting) -> SampleSettings:
        """With no token that ends a response."""
        return SampleSettings(
            max_new_tokens=setting.new_tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_ids=(self.model.loaded.config.vocab_size,),
            pad_id=0,
            num_samples=setting.samples,
        )

    def sampler(self, setting: Setting) -> Any:
        """The compiled sampler of a setting."""
        if setting not in self.programs:

            def jit(name: str, function: Callable[..., Any], **options: Any) -> Any:
                return jax.jit(function, **options)

            self.programs[setting] = compile_sampler(
                self.model.model, self.settings(setting), self.model.loaded.mesh, jit
            )
        return self.programs[setting]

    def draw(self, setting: Setting, prompts: list[list[int]], seed: int) -> list[int]:
        """Draws, and returns how many tokens of each response count."""

        def stopped(ids: list[int]) -> int | None:
            length = own_length(ids[0])
            if len(ids) < length:
                return None
            return length

        responses = draw(
            self.sampler(setting),
            self.model.params,
            prompts,
            settings=self.settings(setting),
            seed=seed,
            width=prompt_width(prompts),
            batch_size=len(prompts),
            put=rows_put(self.model.loaded.mesh),
            fetch=fetch_whole,
            progress=lambda count: None,
            stopped=stopped if setting.ragged else None,
        )
        return [len(response.ids) for response in responses]

    def cache_bytes(self, setting: Setting, prompts: list[list[int]]) -> int:
        """What the cache takes, of prompts and samples."""
        width = least_half(max(map(len, prompts)), prompt_width(prompts))
        packed = pack_prompts(prompts, shards=1, width=width, pad_id=0)
        keys = np.zeros((setting.prompts * setting.samples, 2), np.uint32)
        arrays = (packed.tokens, packed.group, keys, packed.places)
        made = jax.eval_shape(self.sampler(setting).start, self.model.params, *arrays)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.cache))


class Theirs:
    """transformers' generate."""

    def __init__(self, folder: str):
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def draw(self, setting: Setting, prompts: list[list[int]], seed: int) -> list[int]:
        """Draws, and returns how many tokens of each response count."""
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

        class Ends(transformers.StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                drawn = input_ids[:, longest:]
                lengths = torch.tensor([own_length(int(first)) for first in drawn[:, 0]])
                return drawn.shape[1] >= lengths

        criteria = [Ends()] if setting.ragged else []
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=setting.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=setting.samples,
            eos_token_id=self.model.config.vocab_size,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList(criteria),
        )
        drawn = out[:, longest:].tolist()
        return [min(len(row), response_length(setting, row)) for row in drawn]


def seconds_of(function: Callable[[], Any], rounds: int = 20) -> float:
    """The shortest of some calls, after one that compiles."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


class Machine(NamedTuple):
    """What the machine does in a second."""

    bytes: float  # read
    flops: float  # of a layer's products over many tokens

    @classmethod
    def measured(cls, width: int, hidden: int) -> "Machine":
        """By a sum over 512 MiB, and a product of 4,096 tokens."""
        numbers = jnp.ones((2, 2**26), jnp.float32)
        total = jax.jit(lambda x: x.sum(axis=1))
        x = jnp.ones((4096, width), jnp.float32)
        w = jnp.ones((width, hidden), jnp.float32)
        product = jax.jit(lambda x, w: x @ w)
        flops = 2 * 4096 * width * hidden
        return cls(
            bytes=numbers.nbytes / seconds_of(lambda: total(numbers).block_until_ready()),
            flops=flops / seconds_of(lambda: product(x, w).block_until_ready()),
        )


def bound_seconds(config: Any, machine: Machine, prompts: list[list[int]], lengths: Any) -> float:
    """The least time in which responses of these lengths can be drawn, [prompts, samples].

    The prompts' products; then, for every token, reading the weights and the live rows' cache, or
    the products, whichever takes longer.
    """
    weights = num_params(config)
    head = config.vocab_size * config.hidden_size
    layers = weights - head  # the embedding is the head, too
    sizes = np.asarray([len(p) for p in prompts])
    kept = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim  # bytes of a token
    scored = 4 * config.num_layers * config.num_heads * config.head_dim  # flops of a pair of tokens
    total = (2 * layers * sizes.sum() + scored * (sizes**2 / 2).sum()) / machine.flops
    for step in range(int(lengths.max())):
        live = lengths > step
        rows = live.sum()
        if step == 0:
            read, flops = 4 * head, 2 * head * rows
        else:
            cached = (sizes * live.any(axis=1)).sum() + rows * step
            read = 4 * weights + kept * cached
            pairs = (live.sum(axis=1) * sizes).sum() + rows * step
            flops = 2 * weights * rows + scored * pairs
        total += max(read / machine.bytes, flops / machine.flops)
    return float(total)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    ours = Ours(args.model)
    theirs = Theirs(args.model)
    config = ours.model.loaded.config
    texts = read_prompts(args.data, 16)
    results = []
    for setting in SETTINGS:
        prompts = [tokenizer(text)["input_ids"] for text in texts[: setting.prompts]]
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        cores: dict[str, list[float]] = {"ours": [], "theirs": []}
        shares: list[float] = []  # of the bound, by the machine as it is after the draw
        machine = Machine.measured(config.hidden_size, config.intermediate_size)
        ours.draw(setting, prompts, 0)  # compiles
        for turn in range(args.rounds):
            for name, sampler in (("ours", ours), ("theirs", theirs)):
                start, busy = time.perf_counter(), time.process_time()
                drawn = sampler.draw(setting, prompts, turn)
                times[name].append((time.perf_counter() - start) / sum(drawn))
                cores[name].append((time.process_time() - busy) / sum(drawn))
                if name == "ours":
                    lengths = np.reshape(drawn, (setting.prompts, setting.samples))
                    machine = Machine.measured(config.hidden_size, config.intermediate_size)
                    bound = bound_seconds(config, machine, prompts, lengths) / lengths.sum()
                    shares.append(bound / times[name][-1])
        cache = ours.cache_bytes(setting, prompts)
        ours_s, theirs_s = min(times["ours"]), min(times["theirs"])
        results.append(
            {
                "setting": setting.name,
                "prompt_tokens": sum(map(len, prompts)),
                "ours_tokens_per_s": 1 / ours_s,
                "theirs_tokens_per_s": 1 / theirs_s,
                "ratio": theirs_s / ours_s,
                "ratio_of_core_seconds": min(cores["theirs"]) / min(cores["ours"]),
                "cores_busy": min(cores["ours"]) / ours_s,
                "of_the_bound": max(shares),
                "cache_mib": cache / 2**20,
                "gbytes_per_s": machine.bytes / 1e9,
                "gflops": machine.flops / 1e9,
                "load": os.getloadavg()[0],
            }
        )
        print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
