"""A reward that varies among the answers of random models, so that the policy has something to learn."""


def even_length(response_text: str, label: object) -> float:
    return float(len(response_text) % 2 == 0)
