"""The reward of both trainers: how many characters a response has."""


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """One number for each response."""
    return [float(len(response)) for response in responses]
