"""What a user can put right: one line that names the thing, what it is and what is needed."""


class UserError(ValueError):
    """A problem with what the user gave; the command line prints its message as one line."""


class DataError(UserError):
    """A data set or an image that cannot be used."""
