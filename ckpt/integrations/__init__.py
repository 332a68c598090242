"""Adapters for training frameworks, one module each; a framework is imported by its own module alone.

Where a framework's objects can stand in a state as they are, there is no adapter: docs/frameworks.md shows how.
"""
