"""The stages of a run and the command that runs them.

.. include:: guide.md
"""
