"""`python -m pbq` is `pbq`: `torchrun --nproc_per_node 2 -m pbq quantize MODEL OUT`."""

from pbq.cli import main

main()
