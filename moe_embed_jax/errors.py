"""Errors that a user can act on.

Launchers print a `UserError` as one line and exit with status 2; everything else is a defect of
ours and keeps its stack trace.
"""


class UserError(Exception):
    """Wrong input, configuration or environment; the message names the thing and the remedy."""
