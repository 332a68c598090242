"""`python -m ckpt.keeper ROOT NONCE`: starts the keeper and returns at once; nobody's child, nobody's zombie."""

import os
import sys


def main() -> int:
    if os.fork():
        os._exit(0)
    os.setsid()
    from ckpt.keeper.process import serve  # after the fork, which its caller waits for

    return serve(sys.argv[1], sys.argv[2])


if __name__ == "__main__":
    sys.exit(main())
