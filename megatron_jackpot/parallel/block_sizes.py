"""How many logits exist at a time where they are made in blocks. No torch: `plan` counts their memory."""

READ_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a block of tokens that are read: 64 MB in fp32, 512 MB in bf16."""
GRADIENT_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Logits of a block in backward."""
