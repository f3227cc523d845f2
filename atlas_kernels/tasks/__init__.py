"""What is learned on: `images`, `clip`, and `embedded`, which comes with the package.

Each of the three is a door of its own, because they need different packages.
"""
