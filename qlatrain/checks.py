"""What the validation of every schema is written in: one sentence for a value that cannot be, and the nearest name."""

import difflib


def nearest(value: object, options) -> str:
    """`; did you mean X?` when one of the options is close to the value, else nothing."""
    close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_choice(key: str, value: object, options) -> None:
    """Raises ValueError unless `value` is one of `options`, in which None is written null."""
    if value not in options:
        accepted = ", ".join("null" if option is None else str(option) for option in options)
        raise ValueError(f"{key}={value} is not one of {accepted}{nearest(value, options)}")


def check_values(config: object, choices: dict[str, tuple], at_least: dict[str, float]) -> None:
    """Raises ValueError for the first key outside its choices, or below the least it can be.

    choices, at_least: by key from the root of `config`, such as `train.steps`. A value of None has no least.
    """
    for key, options in choices.items():
        check_choice(key, value_at(config, key), options)
    for key, least in at_least.items():
        value = value_at(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key}={value} is below {least}, the least it can be")


def value_at(config: object, key: str) -> object:
    """The value of a key such as `train.steps`."""
    for name in key.split("."):
        config = getattr(config, name)
    return config
