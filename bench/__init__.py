"""Swipr measured beside what one would use instead: ``make bench``.

Everything is measured in one run, in turn, on the same weights and pictures; ``results`` has
the last runs that were kept. Nothing in here is installed, and ``swiprctl`` and ``swiprd`` import
none of it.
"""
