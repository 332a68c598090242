"""For tests of one's own stores and of what trains. `ckpt` itself imports nothing of it.

    ckpt.testing.conformance   what every store must do: a pytest class to subclass
    ckpt.testing.proxy         an object store that fails: a proxy in front of a real one
    ckpt.testing.crash         what a directory may look like after a power cut: recorded, replayed

Whole jobs on nodes that fail are `elastic chaos` and its pytest fixture.
"""
