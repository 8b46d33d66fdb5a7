"""How the server's tensors are made of the trainer's: ``job_server`` reads and tells it, ``job_trainer`` needs none."""

from tricomm.rules import Rules, cat, source

RULES = Rules(
    {
        # The bias is a last column beside its weight.
        "up": cat([source("0.weight"), source("0.bias").unflatten(0, (31, 1))], dim=1),
        "down": source("2.weight").permute(1, 0),
        "down_bias": source("2.bias"),
    }
)
