"""Becomes a command that ends when its parent does: PYTHON child.py PARENT COMMAND ARGUMENT ...

PARENT is the number of the process that starts it. Linux alone has this. It is a script of its own,
as what asks for it must run in the child, and before the command.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            sys.exit("the program that started this one has ended")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run ({error.strerror})")
