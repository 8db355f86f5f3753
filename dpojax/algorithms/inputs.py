"""Config -> what is known of a run before any parameter is read: data, model, steps."""

import dataclasses
import functools
import json
import pathlib
import shutil

from dpojax.algorithms.face import Inputs
from dpojax.algorithms.fitness import unfit_settings
from dpojax.config.load import to_dict
from dpojax.config.rules import doubts
from dpojax.config.schema import Config, with_limits, with_steps
from dpojax.data.open import Data, open_data
from dpojax.data.open_tokenizer import stop_ids
from dpojax.data.shapes import groups_per_step
from dpojax.data.tokenizer_files import copy_companions
from dpojax.data.written import Writing
from dpojax.generation import rewards
from dpojax.runtime.context import Job
from dpojax.untrusted.plain_data import read_json
from dpojax.weights.initial import open_policy, random_model, starting_weights
from dpojax.weights.open import Weights
from dpojax.weights.tokenizer import tokenizer_of


def open_inputs(job: Job) -> Inputs:
    """Data, policy and groups per step, before any parameter is read; completes job.config by what
    they tell.

    Nothing of the workdir is changed: settings and caches wait for job.commit.
    Raises: DpojaxError for what a user can mend.
    """
    config = job.config
    # first of all: a model that is not there is said before anything else
    weights = starting_weights(config)
    if config.sample.num_prompts and rewards.reward_name(config):
        # a misspelt one fails now, not after training
        rewards.load_reward(rewards.reward_name(config))
    positions = (
        random_model(config, 1).max_positions if weights is None else weights.config.max_positions
    )
    job.config = with_limits(config, positions)
    data = open_data(job, tokenizer_of(config.model.init))
    if data.eval_parts:  # each of them was cut to its first pairs already
        job.config = dataclasses.replace(
            job.config, data=dataclasses.replace(job.config.data, eval_max_pairs=0)
        )
    _try_reward(job, data)
    policy = open_policy(job, data, weights)
    groups = 1
    epoch_steps = 1.0
    if data.has_prompts:
        groups = groups_per_step(
            data.train_index, batch_size=config.batch_size, batch_groups=config.batch_groups
        )
        epoch_steps = len(data.train_index.rows) / groups
    job.config = with_steps(job.config, epoch_steps)
    if data.has_prompts and job.config.num_steps:
        held = ""
        if data.has_preferences:
            unit = "responses" if config.loss.objective.unpaired else "pairs"
            held = f" with {len(data.train_index.chosen) / epoch_steps:.3g} {unit}"
        job.say(
            f"training: {job.config.num_steps:,} steps of {groups} prompts{held},"
            f" {job.config.num_steps / epoch_steps:.3g} epochs"
        )
    for line in unfit_settings(
        job.config, data.train, data.train_index, weights, job.config.num_steps / epoch_steps
    ):
        job.say(line)
    for doubt in doubts(job.config):
        job.say(f"warning: {doubt}")
    job.write(functools.partial(write_settings, job, data, weights))
    return Inputs(data, policy, weights, groups)


def _try_reward(job: Job, data: Data) -> None:
    """Calls the user's own reward function on two held-out rows: its mistakes show now, not after
    the training.
    """
    c = job.config.sample
    if (
        not (c.num_prompts and c.reward)
        or data.tokenizer is None
        or data.eval is None
        or data.eval_index is None
    ):
        return
    rows = data.eval_index.rows[:2].tolist()
    texts = [data.eval.plain_texts(row) for row in (rows * 2)[:2]]
    rewards.try_reward(
        c.reward,
        [prompt for prompt, _ in texts],
        [responses[0] if responses else "" for _, responses in texts],
    )


def write_settings(job: Job, data: Data, weights: Weights | None) -> None:
    """run.json and the tokenizer, so that the workdir can be used as a config and as model.init."""
    job.write_file("run.json", json.dumps(to_dict(job.asked), indent=2) + "\n")
    if not job.main_process:
        return
    folder = job.workdir / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    beside = None if weights is None else weights.companions
    generation = None if beside is None else beside / "generation_config.json"
    if (
        generation is not None
        and generation.is_file()
        and generation.resolve() != (folder / generation.name).resolve()
    ):
        shutil.copyfile(generation, folder / generation.name)
    if data.tokenizer is not None:  # its own files, whatever lies beside the weights
        data.tokenizer.save(folder)
        _write_text_files(job.config, data, folder)
    elif beside is not None:
        copy_companions(beside, folder)


def _write_text_files(config: Config, data: Data, folder: pathlib.Path) -> None:
    """What made the training text, beside the tokenizer: its template, what ends a response,
    templates, limits and masks.
    """
    assert data.tokenizer is not None
    c = config.data
    chat = data.train.reader.chat
    if chat is not None and c.chat_template:
        (folder / "chat_template.jinja").write_text(chat.source, encoding="utf-8")
        # of the template that it stands in for
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    ends = sorted(stop_ids(data.tokenizer, chat))
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    named = generation.get("eos_token_id")
    if ends != sorted(
        named if isinstance(named, list) else [named] if isinstance(named, int) else []
    ):
        values = {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    writing = Writing(**{key: getattr(c, key) for key in Writing._fields})
    writing._replace(text_as_chat=data.train.reader.text_as_chat).save(folder)
