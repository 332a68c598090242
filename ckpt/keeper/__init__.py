"""The keeper: one background process per node and run that outlives the workers and imports no torch.

A worker copies its slices into memory that it shares with the keeper; all that follows happens here:

    ram          the tmpfs directory of a run on this node: names, budget, who may remove it
    orders       what workers, keepers and the coordinator say to each other
    persist      one rank's snapshot: digests, data file, part
    coordinator  the keeper of rank 0's node: what is stored next, and the commit
    node         one node's snapshots, from order to outcome
    __main__     the process: starts, serves, ends by itself
    courier      a worker's side: starts the keeper, sends orders, hears outcomes
"""
