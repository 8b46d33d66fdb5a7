"""The errors that tricomm raises.

    TricommError
      SpecError       (ValueError)    a mesh, a layout, a tensor or an option does not say what the rules allow
        ArgumentError (TypeError)     it is not even of the right kind: a word for a number, a misspelt option
      PlanError       (ValueError)    two valid layouts cannot be planned as asked, or a pipeline cannot run
      TransportError  (RuntimeError)  ranks disagree, or one died, stopped or never came

Every message names the value, the rule that it breaks and the remedy.
"""


class TricommError(Exception):
    """The base of everything that tricomm raises on purpose."""


class SpecError(TricommError, ValueError):
    """A mesh, a sharding spec or a local tensor breaks a rule; nothing has been sent."""


class ArgumentError(SpecError, TypeError):
    """An argument is of the wrong kind, or there is no option of that name; nothing has been sent."""


class PlanError(TricommError, ValueError):
    """Two valid specs cannot be planned as asked, or a pipeline's schedule cannot run; nothing has been sent."""


class TransportError(TricommError, RuntimeError):
    """The ranks disagree about a call, or one of them died, stopped or never called."""
