"""A reward that differs between responses of random models: no right answer is needed to learn from it."""


def score(response_text: str, label: object) -> float:
    """The share of digits."""
    return sum(character.isdigit() for character in response_text) / max(1, len(response_text))
