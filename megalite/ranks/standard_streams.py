"""Standard streams that the caller has closed (`<&-`, `>&-`, some daemons) become /dev/null."""

import os
import sys

_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}


def open_closed_streams() -> None:
    """Opens /dev/null in place of each standard stream that is closed. Otherwise, the next file that is opened, such as
    a checkpoint's, gets its descriptor, and what libraries print to descriptors 1 and 2 is written into that file."""
    for descriptor, (name, mode) in enumerate(_MODES.items()):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 (stays open)
