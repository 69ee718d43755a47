"""A reward of one's own, as an example: `--rewards accuracy:1,format:0.5,plots/rewards/brevity.py:brevity:0.2`."""


def brevity(completion):
    """0 for nothing, -1 for 200 characters."""
    return -len(completion) / 200
