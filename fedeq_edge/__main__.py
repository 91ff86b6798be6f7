"""`python -m fedeq_edge` is `fedeq`."""

from fedeq_edge.cli import main

main()
