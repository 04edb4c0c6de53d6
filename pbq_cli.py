"""Where the `pbq` command enters: its presence tells pbq not to import transformers yet."""

from pbq.cli import main

__all__ = ["main"]
