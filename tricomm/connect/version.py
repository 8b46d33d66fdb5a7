"""The version of tricomm, where the parts that compare it and the packaging find it."""

__version__ = "0.1.0"
