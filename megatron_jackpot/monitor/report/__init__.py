"""A run, or several beside each other, on one HTML page: written once, or served while the run goes on.

Everything that a run says is data in the page, never markup; the scripts and styles in assets/ are part of
it.
"""
