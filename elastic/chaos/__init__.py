"""Fault-injection runs: a training script put through the failures of a cluster, on one machine, and judged.

scenario   which faults, when, and what the run promises to survive them; a TOML file
ground     what the nodes stand on: namespaces where root allows them, else processes with folders of their own
node       something with an agent on it that can be lost as a whole
fault      what is done to a node, its link, or the store; some heal
mark       a place in the library's code that tells when a process is there (`ckpt.events.point`)
trigger    the instant of a fault: seconds after the first step, a step, or a mark
evidence   all that was seen of a run: marks, faults, ends of agents, the log, what was left behind
oracle     a judgement from evidence: green, red, or not judged
"""
