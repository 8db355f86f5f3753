"""A reward of any text: its length."""


def reward(prompts, responses):
    return [float(len(response)) for response in responses]
