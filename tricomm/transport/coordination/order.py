"""What is said to ranks whose calls are not in one order, or not on one channel."""

UNNAMED = "Resharder number "
"""Begins the label of a Resharder without a name of its own."""


def same_order_rule(*calls: str) -> str:
    """The rule that ranks broke, and how errors would say better which Resharder is meant.

    Args:
        calls: those that were told, in words.

    Example:
        >>> same_order_rule("call 2 of Resharder 'queries' (number 1)")
        'every rank must make the same calls in the same order'
        >>> same_order_rule("call 2 of Resharder number 1 of float32[8] on rank 0").partition("; ")[2]
        'Resharder(..., name="queries") lets errors say which one is meant'
    """
    rule = "every rank must make the same calls in the same order"
    is_unnamed = any(UNNAMED in call for call in calls)
    return f'{rule}; Resharder(..., name="queries") lets errors say which one is meant' if is_unnamed else rule


def describe_another(rank: int, call: str, other: int, its_number: int, is_of_same: bool, its_tag: int) -> str:
    """What is said to a rank that confirms a call where another rank confirms another one.

    Args:
        rank, call: this one, and its call.
        other, its_number, its_tag: the other one, and its call.
        is_of_same: whether that is of the same Resharder.
    """
    what = "the same Resharder" if is_of_same else f"another Resharder (of tag {its_tag})"
    return f"rank {rank} is in {call}, and rank {other} in call {its_number} of {what}; {same_order_rule(call)}"


def channel_in_words(name: str) -> str:
    """How errors name a channel.

    Example:
        >>> channel_in_words("weights"), channel_in_words("")
        ("channel 'weights'", 'the shared channel')
    """
    return f"channel {name!r}" if name else "the shared channel"
