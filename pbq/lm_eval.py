"""lm-eval's own command line, able to load pbq checkpoints.

    python -m pbq.lm_eval run --model hf --model_args pretrained=OUT --tasks piqa

lm-eval loads no plug-ins, so its own `lm-eval` command cannot load a packed checkpoint. This is the
same command after `import pbq`. `pbq eval` is shorter, and it can read tasks from local files.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Hand `sys.argv` to lm-eval, with the loader of pbq registered."""
    import pbq  # noqa: F401  registers the loader

    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"lm-eval is not installed ({error}): pip install 'pbq-llm[eval]'")
    cli_evaluate()


if __name__ == "__main__":
    main()
