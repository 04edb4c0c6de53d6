"""The directory of a real small model, for the other examples: what `pbq demo` prints."""

from __future__ import annotations

from pbq.demo import demo_model, find_gguf

__all__ = ["demo_model", "find_gguf"]

if __name__ == "__main__":
    print(demo_model())
