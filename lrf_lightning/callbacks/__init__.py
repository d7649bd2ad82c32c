"""Lightning callbacks: hooks and argument checks; the work is done by the solver.

Import them from :mod:`lrf_lightning`, or from their own modules here.
"""
