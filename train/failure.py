"""What stops a training that started well."""


class TrainingError(RuntimeError):
    """A training that cannot go on; the message is one line: what happened, and from where to go on."""
